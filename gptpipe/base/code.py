"""The code that affects the result of each stage, in one list.

dvc.yaml lists the same folders (a test compares them), so `dvc repro` reruns the stages that an edit affects.
The digest of the code is part of the key of an unfinished folder and of the identity of a checkpoint, so
changed code resumes neither. Not listed, because they affect no result: the packages `shell`, `record`, `serve`
and `commands`, `gptpipe/interface.py`, and `gptpipe/params.py`, whose values DVC compares itself.
"""

import hashlib
from functools import cache
from pathlib import Path

STAGE_CODE = {
    "collect": ("base", "formats", "collect"),
    "tokenize": ("base", "formats", "tokenize"),
    "split": (
        "base",
        "formats",
        "collect",
        "harness",
        "split",
    ),  # benchmarks are read like the sources of collect
    "train": ("base", "formats", "model", "score", "train"),
    "evaluate": ("base", "formats", "model", "score", "harness", "evaluate"),
}
_PACKAGE = Path(__file__).parents[1]
_SUFFIXES = {".py", ".jinja"}  # other files come from editors and compilers; .dvcignore lists them for DVC


@cache
def code_digest(stage: str) -> str:
    """SHA-256 of the names and contents of all files that affect the result of a stage, as hex digits."""
    digest = hashlib.sha256()
    for folder in STAGE_CODE[stage]:
        for path in sorted((_PACKAGE / folder).rglob("*")):
            if path.suffix in _SUFFIXES and not path.name.startswith("."):
                content = path.read_bytes()
                digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()

"""Resume an interrupted build: reuse the files that it completed.

`once` writes a record beside the files that it completes. The record contains the SHA-256 of each file, so a
file that has changed is not reused.
"""

import hashlib
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from gptpipe.base.code import code_digest
from gptpipe.base.files import seal, sha256_of, to_json, unseal, write_bytes

_DONE = ".done"  # suffix of a record
Result = TypeVar("Result")


def key_of(stage: str, determinants: list[Any], *libraries: str) -> str:
    """Digest of all that determines the output of a stage: its input, its code, Python and some libraries."""
    versions = [platform.python_version(), *map(version, libraries)]
    return hashlib.sha256(to_json([determinants, code_digest(stage), versions])).hexdigest()[:16]


def once(files: list[Path], make: Callable[[], Result], key: str = "") -> Result:
    """Run `make`, which writes `files`, unless an interrupted run already produced them. Returns its result.

    The files are in one folder, and may not change any more: the manifest takes their SHA-256 from the record.
    `key` is a digest of everything that determines them and that is not part of the folder's key. A recorded
    result has been through JSON: its tuples are lists now. `new_folder` deletes the records when it finishes.
    """
    record = finished(files, key)
    if record:
        recorded: Result = record["result"]
        return recorded
    result = make()
    content = {"files": {path.name: sha256_of(path) for path in files}, "key": key, "result": result}
    write_bytes(_record_path(files), seal(content))
    return result


def finished(files: list[Path], key: str = "") -> dict[str, Any]:
    """The record of finished files, or an empty dict if there is none or anything has changed."""
    with suppress(OSError, ValueError, KeyError):  # a file or its record is missing, or the record is damaged
        record = unseal(_record_path(files).read_bytes())
        if record["key"] == key and record["files"] == {path.name: sha256_of(path) for path in files}:
            return record
    return {}


def _record_path(files: list[Path]) -> Path:
    return files[0].with_name(f".{files[0].name}{_DONE}")


def recorded_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below a folder that have a record, by relative name."""
    digests: dict[str, str] = {}
    for path in sorted(folder.rglob(f".*{_DONE}")):
        with suppress(ValueError):  # damaged: the files are read again
            files: dict[str, str] = unseal(path.read_bytes())["files"]
            below = path.parent.relative_to(folder)
            digests |= {(below / name).as_posix(): digest for name, digest in files.items()}
    return digests

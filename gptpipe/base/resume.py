"""Resume an interrupted build: which of its files are complete, and whether they are still the right ones.

`finish` writes a record beside the files, `finished` reads it. The record contains the digests of the files, so files
that changed since then are not reused.
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

_DONE = ".done"  # suffix of the record that files are complete
Result = TypeVar("Result")


def key_of(stage: str, determinants: list[Any], *libraries: str) -> str:
    """Digest of all that determines what a stage builds: its input, its code, Python and the libraries it uses."""
    versions = [platform.python_version(), *map(version, libraries)]
    return hashlib.sha256(to_json([determinants, code_digest(stage), versions])).hexdigest()[:16]


def once(files: list[Path], make: Callable[[], Result]) -> Result:
    """Run `make`, which writes `files`, unless an interrupted run already produced them; returns its result."""
    if done := finished(files):
        result: Result = done["result"]
        return result
    finish(files, result := make())
    return result


def finish(files: list[Path], result: Any) -> None:
    """Record for `finished` that the files are complete. `result` is plain JSON.

    The note is deleted when the enclosing `new_folder` finishes.
    """
    note = {"files": [sha256_of(path) for path in files], "result": result}
    write_bytes(files[0].with_name(f".{files[0].name}{_DONE}"), seal(note))


def finished(files: list[Path]) -> dict[str, Any]:
    """What `finish` recorded, if all of these files are unchanged since then; else an empty dict."""
    with suppress(OSError, ValueError, KeyError):  # never made, or damaged
        done = unseal(files[0].with_name(f".{files[0].name}{_DONE}").read_bytes())
        if done["files"] == [sha256_of(path) for path in files]:
            return done
    return {}


def remove_records(folder: Path) -> None:
    """Remove all records of `finish` from a folder that is complete."""
    for record in sorted(folder.rglob(f".*{_DONE}")):
        record.unlink()

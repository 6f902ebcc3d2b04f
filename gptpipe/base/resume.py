"""Resume an interrupted build: reuse the files that it completed.

`finish` writes a record beside the files, and `finished` reads it. The record contains the SHA-256 of each file, so
a file that has changed is not reused.
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
    """Digest of everything that determines the output of a stage: its input, its code, Python and some libraries."""
    versions = [platform.python_version(), *map(version, libraries)]
    return hashlib.sha256(to_json([determinants, code_digest(stage), versions])).hexdigest()[:16]


def once(files: list[Path], make: Callable[[], Result]) -> Result:
    """Run `make`, which writes `files`, unless an interrupted run already produced them. Returns its result.

    A recorded result has been through JSON: its tuples are lists now.
    """
    record = finished(files)
    if record:
        recorded: Result = record["result"]
        return recorded
    result = make()
    finish(files, result)
    return result


def finish(files: list[Path], result: Any) -> None:
    """Record that the files are complete. `result` is plain JSON.

    The files are in one folder, and may not change any more: the manifest takes their SHA-256 from the record.
    The record is deleted when the enclosing `new_folder` finishes.
    """
    record = {"files": {path.name: sha256_of(path) for path in files}, "result": result}
    write_bytes(_record_path(files), seal(record))


def finished(files: list[Path]) -> dict[str, Any]:
    """The record that `finish` wrote, or an empty dict if there is none or any of the files has changed."""
    with suppress(OSError, ValueError, KeyError):  # a file or its record is missing, or the record is damaged
        record = unseal(_record_path(files).read_bytes())
        if record["files"] == {path.name: sha256_of(path) for path in files}:
            return record
    return {}


def _record_path(files: list[Path]) -> Path:
    return files[0].with_name(f".{files[0].name}{_DONE}")


def recorded_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below a folder that have a record, by relative name. `finish` read them."""
    digests: dict[str, str] = {}
    for path in sorted(folder.rglob(f".*{_DONE}")):
        with suppress(ValueError):  # damaged: the files are read again
            files: dict[str, str] = unseal(path.read_bytes())["files"]
            below = path.parent.relative_to(folder)
            digests |= {(below / name).as_posix(): digest for name, digest in files.items()}
    return digests


def remove_records(folder: Path) -> None:
    """Remove all records of `finish` below a folder."""
    for record in sorted(folder.rglob(f".*{_DONE}")):
        record.unlink()

"""Durable files: every byte that the project writes to disk goes through here.

A file appears under its final name only when it is complete and on disk (temporary name in the same folder, flush,
fsync, rename, fsync of the folder). A folder appears the same way, with `manifest.json` as its last file: schema
version, the SHA-256 and size of every file, counts, and the digests of all that it was made from.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gptpipe.errors import IntegrityError, ResourceError

MANIFEST = "manifest.json"
SCHEMA = 1
_DONE = ".done"  # ends the name of a note that files are finished
Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)


class FileEntry(BaseModel):
    """One file of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    n_bytes: int


class Manifest(BaseModel):
    """What a folder holds and what it was made from. Holds no time, so equal content gives equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    made_from: dict[str, str]  # every ancestor, back to the sources: name -> digest
    counts: dict[str, Any]
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        return to_json(self.model_dump())

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's bytes; it names the folder's whole content."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def lineage(self, name: str) -> dict[str, str]:
        """`made_from` of what is made from this folder, whose name is `name`."""
        return {**self.made_from, name: self.digest}


def to_json(value: Any) -> bytes:
    """The one JSON form used on disk: sorted keys, two spaces, no NaN, a line feed at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file whose size is limited. Raises OSError, and ValueError for any other file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"{status.st_size:,} bytes, the limit is {max_bytes:,}")
    return path.read_bytes()


def read_json(path: Path, kind: type[Model], max_bytes: int) -> Model:
    """A JSON file as an object of `kind`, types taken strictly. Raises OSError, and ValueError of one short line."""
    try:
        return kind.model_validate_json(read_bytes(path, max_bytes), strict=True)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error


def first_fault(error: ValidationError) -> str:
    """What is wrong with the first wrong value, in one short line; its place may be a key from the file."""
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    return f"{place!r:.100}: {fault['msg']:.200}" if place else f"{fault['msg']:.200}"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a ResourceError that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(
            f"{path}: cannot write: {reason}; free space or mend the permissions, then rerun"
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears whole under `path`, or not at all. Raises ResourceError."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                written = partial.stat().st_size if partial.exists() else 0
                error.strerror = f"{error.strerror} (it needs more than {written:,} bytes)"
            partial.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    with new_file(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, to_json(value))


class NewFolder:
    """A folder under construction: write files into `path`, note `counts`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, Any] = {}


@contextmanager
def new_folder(target: Path, made_from: dict[str, str], key: str = "") -> Iterator[NewFolder]:
    """Build a folder that appears whole under `target`, manifest included, in place of what was there.

    What was there comes back if anything fails. `made_from` maps the name of each ancestor to its digest. With a `key`,
    which names all that determines the content, a build that is killed or stopped goes on where it was: `path` holds
    what it left, for `once`. Raises ResourceError.
    """
    partial, old = (target.with_name(f".{target.name}{suffix}.partial") for suffix in (f".{key}" * bool(key), ".old"))
    keep = partial if key else None
    with disk_errors(target):
        _clear_up(target, old, keep)
        partial.mkdir(parents=True, exist_ok=True)
    try:
        folder = NewFolder(partial)
        yield folder
        with disk_errors(target):
            for note in sorted(partial.rglob(f".*{_DONE}")):
                note.unlink()
            files = {name: FileEntry(sha256=sha256_of(partial / name), n_bytes=(partial / name).stat().st_size)
                     for name in _files_below(partial)}  # fmt: skip
            manifest = Manifest(schema_version=SCHEMA, made_from=made_from, counts=folder.counts, files=files)
            write_bytes(partial / MANIFEST, manifest.to_bytes())
            for below in sorted(p for p in partial.rglob("*") if p.is_dir()):
                _sync_folder(below)
            if target.exists():
                target.replace(old)
            partial.replace(target)
            _sync_folder(target.parent)
    except Exception:
        keep = None
        raise
    finally:
        with disk_errors(target):
            _clear_up(target, old, keep)


def key_of(determinants: list[Any], *libraries: str) -> str:
    """Digest of all that determines what is built, this code, Python and the libraries that build it included."""
    code = [sha256_of(path) for path in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = [platform.python_version(), *map(version, libraries)]
    return hashlib.sha256(to_json([determinants, code, versions])).hexdigest()[:16]


def once(files: list[Path], make: Callable[[], Result]) -> Result:
    """What `make`, which writes these files, returned: now, or before a kill where all are still as they were then."""
    if done := finished(files):
        found: Result = done["result"]
        return found
    finish(files, result := make())
    return result


def finish(files: list[Path], result: Any) -> None:
    """Note that the files are made, for `finished`; goes with the end of the `new_folder` around. Plain JSON."""
    note = {"sha256": [sha256_of(path) for path in files], "result": result}
    write_json(files[0].with_name(f".{files[0].name}{_DONE}"), note)


def finished(files: list[Path]) -> dict[str, Any]:
    """What `finish` noted, where all of these files are still as they were then; else nothing."""
    with suppress(OSError, ValueError, TypeError, KeyError):  # never made, or damaged
        done: dict[str, Any] = json.loads(files[0].with_name(f".{files[0].name}{_DONE}").read_bytes())
        if done["sha256"] == [sha256_of(path) for path in files]:
            return done
    return {}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, its files not looked at. Raises IntegrityError."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; make the folder again with `dvc repro`") from error
    except ValidationError as error:
        raise IntegrityError(f"{path}: not a manifest; make the folder again with `dvc repro -f`") from error
    if manifest.schema_version != SCHEMA:
        raise IntegrityError(f"{path}: schema {manifest.schema_version}, this version reads {SCHEMA}; run `dvc repro`")
    return manifest


def check_parent(folder: Path, parent: Path) -> None:
    """Raises IntegrityError where `folder` was not made from what `parent` holds now."""
    if read_manifest(folder).made_from.get(parent.name) != read_manifest(parent).digest:
        raise IntegrityError(f"{folder}: not made from what {parent} holds now; make it again with `dvc repro`")


def verify(folder: Path) -> Manifest:
    """The manifest of a folder, every file checked against it (one full read). Raises IntegrityError."""
    manifest = read_manifest(folder)
    present = set(_files_below(folder))
    for name in sorted(present.symmetric_difference(manifest.files)):
        state = "is not in the manifest" if name in present else "is missing"
        raise IntegrityError(f"{folder / name}: {state}; make the folder again with `dvc repro -f`")
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        try:
            differs = path.stat().st_size != entry.n_bytes or sha256_of(path) != entry.sha256
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; mend the disk or the permissions") from error
        if differs:
            raise IntegrityError(f"{path}: differs from its manifest; make the folder again with `dvc repro -f`")
    return manifest


def _files_below(folder: Path) -> list[str]:
    """Relative names of all files but the folder's own manifest, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _clear_up(target: Path, old: Path, keep: Path | None) -> None:
    """Remove what builds leave behind, this one or those that were killed, but for `keep`; put back `old` where no
    successor stands."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*partial")):
        if left not in (old, keep):
            shutil.rmtree(left)
    if old.exists() and not target.exists():
        old.replace(target)
    elif old.exists():
        aside = target.with_name(f".{target.name}.partial")
        old.replace(aside)  # renamed first: a half-removed folder never comes back
        shutil.rmtree(aside)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, not only the files' content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

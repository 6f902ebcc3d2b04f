"""Durable files: every byte that the project writes to disk goes through here.

A file appears under its final name only when it is complete and on disk (temporary name in the same folder, flush,
fsync, rename, fsync of the folder). A folder appears the same way, with `manifest.json` as its last file: schema
version, the SHA-256 and size of every file, counts, the digests of everything it was made from, and the SHA-256 of
all this. Only one process at a time may build a folder.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gptpipe.base.code import code_digest
from gptpipe.shell.errors import IntegrityError
from gptpipe.shell.locks import disk_errors, make_folder, one_writer, sync_folder

MANIFEST = "manifest.json"
SCHEMA = 2
_DONE = ".done"  # suffix of a note that files are finished
Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)


class FileEntry(BaseModel):
    """One file of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    n_bytes: int


class Manifest(BaseModel):
    """What a folder contains and what it was made from. It contains no time, so equal content gives equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    made_from: dict[str, str]  # every ancestor, back to the sources: name -> digest
    counts: dict[str, Any]
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        return seal(self.model_dump())

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


def seal(content: dict[str, Any]) -> bytes:
    """JSON of `content` that also contains its own SHA-256, so `unseal` notices any change, such as a flipped bit."""
    return to_json({**content, "sha256": hashlib.sha256(to_json(content)).hexdigest()})


def unseal(data: bytes) -> dict[str, Any]:
    """The content of what `seal` returned. Raises ValueError if any byte is different."""
    try:
        content: dict[str, Any] = json.loads(data)
        del content["sha256"]
        is_unchanged = seal(content) == data
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a sealed JSON object") from error
    if not is_unchanged:
        raise ValueError("changed after it was written")
    return content


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
def new_file(path: Path, n_bytes: int = 0) -> Iterator[BinaryIO]:
    """Write a file that appears whole under `path`, or not at all; `n_bytes` is its size if known.

    Raises ResourceError.
    """
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        make_folder(path.parent)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                written = partial.stat().st_size if partial.exists() else 0
                if n_bytes or written:
                    needed = f"{n_bytes:,}" if n_bytes else f"more than {written:,}"
                    error.strerror = f"{error.strerror} (it needs {needed} bytes)"
            partial.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    with new_file(path, len(content)) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, to_json(value))


class NewFolder:
    """A folder under construction: write files into `path`, and set `counts`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, Any] = {}


@contextmanager
def new_folder(target: Path, made_from: dict[str, str], key: str = "") -> Iterator[NewFolder]:
    """Build a folder that appears whole under `target`, manifest included, and replaces what was there.

    If anything fails, the previous folder stays. `made_from` maps the name of each ancestor to its digest. `key` names
    everything that determines the content: with it, a killed or stopped build continues from the files that it left
    in `path`, see `once`. Raises ResourceError, also if another process builds the folder.
    """
    with one_writer(target):
        partial, old = (target.with_name(f".{target.name}{s}.partial") for s in (f".{key}" if key else "", ".old"))
        keep = partial if key else None
        with disk_errors(target):
            _clear_up(target, old, keep)
            make_folder(partial)
            for leftover in sorted(partial.rglob(".*.partial")):  # of a killed build
                _remove(leftover)
        try:
            folder = NewFolder(partial)
            yield folder
            with disk_errors(target):
                _finish_folder(folder, made_from)
                if target.exists():
                    target.replace(old)
                partial.replace(target)
                sync_folder(target.parent)
        except Exception:
            keep = None
            raise
        finally:
            with disk_errors(target):
                _clear_up(target, old, keep)


def _finish_folder(folder: NewFolder, made_from: dict[str, str]) -> None:
    """Remove the notes of `finish`, write the manifest, and make all names durable."""
    for note in sorted(folder.path.rglob(f".*{_DONE}")):
        note.unlink()
    files: dict[str, FileEntry] = {}
    for name in _files_below(folder.path):
        path = folder.path / name
        files[name] = FileEntry(sha256=sha256_of(path), n_bytes=path.stat().st_size)
    manifest = Manifest(schema_version=SCHEMA, made_from=made_from, counts=folder.counts, files=files)
    write_bytes(folder.path / MANIFEST, manifest.to_bytes())
    for below in sorted(path for path in folder.path.rglob("*") if path.is_dir()):
        sync_folder(below)


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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, without looking at its files. Raises IntegrityError."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        version = re.search(rb'"schema_version": (\d+)', data)
        if version and int(version[1]) != SCHEMA:
            raise IntegrityError(f"{path}: schema {int(version[1])}, this version reads {SCHEMA}; run `dvc repro`")
        return Manifest.model_validate(unseal(data), strict=True)
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; make the folder again with `dvc repro`") from error
    except ValueError as error:  # pydantic's too
        raise IntegrityError(f"{path}: damaged; make the folder again with `dvc repro -f`") from error


def check_parent(folder: Path, parent: Path) -> None:
    """Raise IntegrityError unless `folder` was made from the present content of `parent`."""
    if read_manifest(folder).made_from.get(parent.name) != read_manifest(parent).digest:
        raise IntegrityError(f"{folder}: made from another {parent} than the present one; run `dvc repro`")


def verify(folder: Path) -> Manifest:
    """The manifest of a folder, after checking every file against it (one full read). Raises IntegrityError."""
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
            raise IntegrityError(f"{path}: {error.strerror}; check the disk and the permissions") from error
        if differs:
            raise IntegrityError(f"{path}: differs from its manifest; make the folder again with `dvc repro -f`")
    return manifest


def _files_below(folder: Path) -> list[str]:
    """Relative names of all files but the folder's own manifest, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _clear_up(target: Path, old: Path, keep: Path | None) -> None:
    """Remove what this build and killed builds left behind, except `keep`; restore `old` if it was not replaced."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*partial")):
        if left not in (old, keep):
            _remove(left)
    if old.exists() and not target.exists():
        old.replace(target)
    elif old.exists():
        aside = target.with_name(f".{target.name}.partial")
        old.replace(aside)  # renamed first, for good: a half-removed folder never comes back
        sync_folder(aside.parent)
        _remove(aside)


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

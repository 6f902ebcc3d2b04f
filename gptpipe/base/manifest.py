"""Folders with a manifest: built whole or not at all, and verified before use.

`manifest.json` is the last file of a folder: schema version, the SHA-256 and size of every file, counts, the digests
of everything that the folder was made from, and the SHA-256 of all this. A folder appears under its final name only
when it is complete and on disk. Only one process at a time may build it.
"""

import glob
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gptpipe.base.files import seal, sha256_of, unseal, write_bytes
from gptpipe.base.resume import remove_records
from gptpipe.shell.errors import IntegrityError
from gptpipe.shell.locks import disk_errors, make_folder, one_writer, sync_folder

MANIFEST = "manifest.json"
SCHEMA = 2


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
    """Remove the records of `finish`, write the manifest, and make all names durable."""
    remove_records(folder.path)
    files: dict[str, FileEntry] = {}
    for name in _files_below(folder.path):
        path = folder.path / name
        files[name] = FileEntry(sha256=sha256_of(path), n_bytes=path.stat().st_size)
    manifest = Manifest(schema_version=SCHEMA, made_from=made_from, counts=folder.counts, files=files)
    write_bytes(folder.path / MANIFEST, manifest.to_bytes())
    for below in sorted(path for path in folder.path.rglob("*") if path.is_dir()):
        sync_folder(below)


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

"""Folders with a manifest. They are built as a whole and verified before use.

`manifest.json` contains the schema version, the SHA-256 and size of every file, counts, the digests of
everything that the folder was made from, and the SHA-256 of all this. It is written last. A folder gets its
final name only when it is complete and on disk. Only one process at a time can build it.
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
from gptpipe.base.parallel import map_in_order
from gptpipe.base.resume import recorded_digests
from gptpipe.shell.errors import IntegrityError
from gptpipe.shell.locks import disk_errors, make_folder, one_writer, sync_folder

MANIFEST = "manifest.json"
SCHEMA = 2
_SMALL_BYTES = 1 << 28  # of files: below, they are hashed in less time than worker processes need to start


class FileEntry(BaseModel):
    """One file of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    n_bytes: int


class Manifest(BaseModel):
    """The content and the origin of a folder. It contains no time, so equal folders have equal manifests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    made_from: dict[str, str]  # name -> digest of every ancestor, back to the sources
    counts: dict[str, Any]
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        return seal(self.model_dump())

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's bytes. It identifies the whole content of the folder."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def lineage(self, name: str) -> dict[str, str]:
        """`made_from` for a folder that is made from this one. `name` is the name of this folder."""
        return {**self.made_from, name: self.digest}


class NewFolder:
    """A folder that is being built: write files into `path`, and set `counts`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, Any] = {}


@contextmanager
def new_folder(target: Path, made_from: dict[str, str], key: str = "") -> Iterator[NewFolder]:
    """Build a folder and its manifest.

    A complete folder replaces `target`; after an error, `target` is unchanged.

    `made_from` maps the name of each ancestor to its digest. `key` is a digest of everything that determines
    the content, except of what the records of `gptpipe.base.resume` cover by keys of their own. With a key, a
    build that is killed or fails leaves its files for the next build with the same key. Raises ResourceError,
    also if another process is building the folder.
    """
    partial = target.with_name(f".{target.name}.{key}.partial" if key else f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old.partial")
    kept_partial = partial if key else None
    with one_writer(target):
        with disk_errors(target):
            _remove_leftovers_and_restore_old(target, old, kept_partial)
            make_folder(partial)
        try:
            folder = NewFolder(partial)
            yield folder
            with disk_errors(target):
                _finish_folder(folder, made_from)
                if target.exists():
                    target.replace(old)
                partial.replace(target)
                sync_folder(target.parent)
        finally:
            with disk_errors(target):
                _remove_leftovers_and_restore_old(target, old, kept_partial)


def _finish_folder(folder: NewFolder, made_from: dict[str, str]) -> None:
    """Write the manifest, remove what only an interrupted build needs, and sync all names to disk."""
    recorded = recorded_digests(folder.path)
    files: dict[str, FileEntry] = {}
    for name in filter(_is_content, _files_below(folder.path)):
        path = folder.path / name
        files[name] = FileEntry(sha256=recorded.get(name) or sha256_of(path), n_bytes=path.stat().st_size)
    manifest = Manifest(schema_version=SCHEMA, made_from=made_from, counts=folder.counts, files=files)
    write_bytes(folder.path / MANIFEST, manifest.to_bytes())
    for path in sorted(folder.path.rglob(".*")):
        _remove(path)
    for path in sorted(folder.path.rglob("*")):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder.path)  # after a power cut, what was removed would be back


def _is_content(name: str) -> bool:
    """Whether a file stays in a finished folder.

    Names with a dot first are half-written files of a killed build, and what `gptpipe.base.resume` needs.
    """
    return not any(part.startswith(".") for part in Path(name).parts)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, without checking its files. Raises IntegrityError."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        # A folder of another schema may not pass the checks below.
        version = re.search(rb'"schema_version": (\d+)', data)
        if version and int(version[1]) != SCHEMA:
            raise IntegrityError(
                f"{path}: schema {int(version[1])}, this version reads {SCHEMA}; run `dvc repro`"
            )
        return Manifest.model_validate(unseal(data), strict=True)
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; make the folder again with `dvc repro`") from error
    except ValueError as error:  # also the ValidationError of pydantic
        raise IntegrityError(f"{path}: damaged; make the folder again with `dvc repro -f`") from error


def check_parent(folder: Path, parent: Path) -> None:
    """Raise IntegrityError unless `folder` was made from the current content of `parent`."""
    if read_manifest(folder).made_from.get(parent.name) != read_manifest(parent).digest:
        raise IntegrityError(
            f"{folder}: made from another version of {parent} than the current one; run `dvc repro`"
        )


def verify(folder: Path, *, in_workers: bool = False) -> Manifest:
    """Check every file of a folder against the manifest, and return the manifest. Raises IntegrityError.

    With `in_workers`, worker processes read a large folder.
    """
    manifest = read_manifest(folder)
    present = set(_files_below(folder))
    differing = present.symmetric_difference(manifest.files)
    if differing:
        name = min(differing)
        state = "is not in the manifest" if name in present else "is missing"
        raise IntegrityError(f"{folder / name}: {state}; make the folder again with `dvc repro -f`")
    entries = {folder / name: entry for name, entry in sorted(manifest.files.items())}
    damaged = "differs from its manifest; make the folder again with `dvc repro -f`"
    for path, entry in entries.items():
        with _read_errors(path):
            if path.stat().st_size != entry.n_bytes:
                raise IntegrityError(f"{path}: {damaged}")
    is_small = not in_workers or sum(entry.n_bytes for entry in entries.values()) < _SMALL_BYTES
    digests = map_in_order(sha256_of, entries, small=is_small, local=True)
    for path, entry in entries.items():
        with _read_errors(path):
            if next(digests) != entry.sha256:
                raise IntegrityError(f"{path}: {damaged}")
    return manifest


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; check the disk and the permissions") from error


def _files_below(folder: Path) -> list[str]:
    """Relative names of all files except the folder's own manifest, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _remove_leftovers_and_restore_old(target: Path, old: Path, kept_partial: Path | None) -> None:
    """Remove the leftovers of this build and of killed builds, except `kept_partial`.

    Restore `old` if it has no successor.
    """
    for leftover in sorted(target.parent.glob(f".{glob.escape(target.name)}.*partial")):
        if leftover not in (old, kept_partial):
            _remove(leftover)
    if old.exists() and not target.exists():
        old.replace(target)
    elif old.exists():
        doomed = target.with_name(f".{target.name}.partial")
        old.replace(doomed)  # so that a folder that is removed only in part is never restored
        sync_folder(doomed.parent)
        _remove(doomed)


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""One writer at a time for each file or folder, and file names that survive a power cut."""

import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gptpipe.shell.errors import ResourceError

_LOCK_SECONDS = 3.0  # to wait for another writer, which may finish soon


@contextmanager
def one_writer(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, so that no other process that uses this lock writes it.

    The lock is the file `.NAME.lock` beside `target`; it contains the name of the process that holds it. The
    operating system releases the lock when the process ends, even by SIGKILL. Raises ResourceError if another
    process still holds the lock after three seconds.
    """
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    with disk_errors(target):
        make_folder(path.parent)
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            holder = path.read_text(errors="replace").strip() if path.exists() else ""
            holder = holder or "another process"
            raise ResourceError(
                f"{target}: {holder} is writing it; wait until it ends, or stop it, then rerun"
            ) from error
    try:
        with disk_errors(target):
            path.write_text(f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).stem})\n")
        yield
    finally:
        with suppress(OSError):  # a lock file that nobody holds does no harm
            path.unlink()  # before the release: a waiting process notices it and creates the file again
        lock.release()


def is_locked(target: Path) -> bool:
    """Whether a process holds the lock of `target`."""
    path = target.with_name(f".{target.name}.lock")
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def remove_free_lock(path: Path) -> bool:
    """Remove the lock file of a killed process. Returns False if a process holds the lock."""
    try:
        with FileLock(path, timeout=0):
            path.unlink()
        return True
    except Timeout:
        return False


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a ResourceError that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(
            f"{path}: cannot write: {reason}; free space or fix the permissions, then rerun"
        ) from error


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and sync each name to disk, so that it survives a power cut."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk. Syncing a file saves its content only."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

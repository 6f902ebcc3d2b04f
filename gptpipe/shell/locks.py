"""One writer at a time for each file or folder, and names that survive a power cut."""

import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gptpipe.shell.errors import ResourceError

_LOCK_SECONDS = 3.0  # to wait for another writer, which may be about to end


@contextmanager
def one_writer(target: Path) -> Iterator[None]:
    """Be the only process that writes `target`, as long as all others ask too.

    The lock is the file `.NAME.lock` beside it, which names its holder. The system frees the lock when the process
    ends, however it ends. Raises ResourceError if another process still holds it after three seconds.
    """
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    with disk_errors(target):
        make_folder(path.parent)
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            holder = path.read_text(errors="replace").strip() if path.exists() else ""
            raise ResourceError(
                f"{target}: {holder or 'another process'} is writing it; wait until it ends, or stop it, then rerun"
            ) from error
    try:
        with disk_errors(target):
            path.write_text(f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).stem})\n")
        yield
    finally:
        with suppress(OSError):  # a free lock's file does no harm
            path.unlink()  # before the release: a process that waits sees this and opens the name again
        lock.release()


def remove_free_lock(path: Path) -> bool:
    """Remove the lock file that a killed process left; returns False if a process holds the lock."""
    try:
        with FileLock(path, timeout=0):
            path.unlink()
        return True
    except Timeout:
        return False


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a ResourceError that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(f"{path}: cannot write: {reason}; free space or fix the permissions, then rerun") from error


def make_folder(path: Path) -> None:
    """Create a folder and the missing ones above it. Each name is on disk, so a power cut loses nothing below it."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, not only the files' content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

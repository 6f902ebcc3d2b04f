"""The mark of a finished training. Its last checkpoint is kept until stage evaluate is complete.

DVC may be killed after the training ends and before it records the result. Then it runs the stage again. The
stage finds the mark and only writes its results again, so there is one training and one run in the tracking
store.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptpipe.base.files import seal, unseal, write_bytes
from gptpipe.shell.locks import disk_errors, one_writer, remove_free_lock, sync_folder

_MARK = "finished.json"  # in the checkpoint folder


def mark_finished(folder: Path, run_id: str | None, environment: dict[str, Any]) -> None:
    """Record in a checkpoint folder that the training is finished. Raises ResourceError."""
    write_bytes(folder / _MARK, seal({"run_id": run_id, "environment": environment}))


def finished_in(folder: Path) -> dict[str, Any]:
    """The content of the mark: `run_id` and `environment`. Empty if the training is not finished."""
    with suppress(OSError, ValueError):  # no mark, or a damaged one; the checkpoint contains the progress
        return unseal((folder / _MARK).read_bytes())
    return {}


def discard_finished(checkpoints: Path, run_id: str) -> None:
    """Remove the checkpoint folder of the finished training with this run. Raises ResourceError."""
    for doomed in sorted(checkpoints.glob(".*.partial")):  # `discard` was interrupted
        shutil.rmtree(doomed, ignore_errors=True)
    for lock in sorted(checkpoints.glob(".*.lock")):
        with suppress(OSError):  # a lock file that nobody holds does no harm
            remove_free_lock(lock)
    for mark in sorted(checkpoints.glob(f"*/{_MARK}")):
        if finished_in(mark.parent).get("run_id") == run_id:
            discard(mark.parent)


def discard(folder: Path) -> None:
    """Remove a checkpoint folder. It is renamed first, so that no incomplete folder ever has its name."""
    doomed = folder.with_name(f".{folder.name}.partial")
    with one_writer(folder), disk_errors(folder):
        if doomed.exists():
            shutil.rmtree(doomed)
        if folder.exists():
            folder.rename(doomed)
            sync_folder(doomed.parent)  # otherwise a power cut could undo the renaming
            shutil.rmtree(doomed)

"""A finished training keeps its last checkpoint until stage evaluate is done.

DVC may be killed after the training ends and before it records the result. It then runs the stage again, which finds
the last checkpoint and only writes the results again: one training, one run in the tracking store.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptpipe.base.files import seal, unseal, write_bytes
from gptpipe.shell.locks import disk_errors, one_writer, remove_free_lock, sync_folder

_MARK = "finished.json"


def mark_finished(folder: Path, run_id: str | None, environment: dict[str, Any]) -> None:
    """Record in a checkpoint folder that the training is finished. Raises ResourceError."""
    write_bytes(folder / _MARK, seal({"run_id": run_id, "environment": environment}))


def finished_in(folder: Path) -> dict[str, Any]:
    """What `mark_finished` recorded: `run_id` and `environment`; empty if the training is not finished."""
    with suppress(OSError, ValueError):  # no mark, or a damaged one: the checkpoint still says how far it came
        return unseal((folder / _MARK).read_bytes())
    return {}


def discard_finished(checkpoints: Path, run_id: str) -> None:
    """Remove the checkpoint of the finished training that has this run. Raises ResourceError."""
    for doomed in sorted(checkpoints.glob(".*.partial")):  # `discard` was interrupted
        shutil.rmtree(doomed, ignore_errors=True)
    for lock in sorted(checkpoints.glob(".*.lock")):
        with suppress(OSError):  # a free lock does no harm
            remove_free_lock(lock)
    for mark in sorted(checkpoints.glob(f"*/{_MARK}")):
        if finished_in(mark.parent).get("run_id") == run_id:
            discard(mark.parent)


def discard(folder: Path) -> None:
    """Remove a checkpoint folder. If this is interrupted, the folder is gone under its name all the same."""
    doomed = folder.with_name(f".{folder.name}.partial")
    with one_writer(folder), disk_errors(folder):
        if doomed.exists():
            shutil.rmtree(doomed)
        if folder.exists():
            folder.rename(doomed)
            sync_folder(doomed.parent)  # or a power cut could leave a half-removed folder under its name
            shutil.rmtree(doomed)

"""`gptpipe restore`: the code, parameters, data and model of a recorded run, in a new folder."""

import os
import subprocess
import sys
from pathlib import Path

from mlflow.tracking import MlflowClient

from gptpipe.base.files import write_bytes
from gptpipe.record.store import REPRODUCE, connect, find_run, runs_beginning_with, store_errors
from gptpipe.shell.console import say
from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import InputError, ResourceError

_DVC = (sys.executable, "-m", "dvc")  # works without an activated environment too
_STAGES = ("collect", "tokenize", "split", "train")  # evaluate is not in dvc.lock, which is saved while it runs
_PATCH = "code.patch"


def restore(run_id: str, folder: Path) -> None:
    """Make a git worktree of the run's commit in `folder`, with its changes, its dvc.lock, data and model.

    Data and model come from DVC's cache of this project. Raises InputError, ResourceError.
    """
    with store_errors():
        client = connect()
        known_id = _find_run(client, run_id)
        commit = client.get_run(known_id).data.tags.get("mlflow.source.git.commit")
        if commit is None or not _has_patch(client, known_id):
            raise InputError(
                f"run {known_id}: its code is not recorded, "
                "because it started outside git or with over 1 MB of changes"
            )
        saved = Path(client.download_artifacts(known_id, REPRODUCE))
    _run("git", "worktree", "add", "--detach", str(folder), commit)
    _run("git", "-C", str(folder), "apply", "--allow-empty", str(saved / _PATCH))
    for file in sorted(path for path in saved.rglob("*") if path.is_file() and path.name != _PATCH):
        write_bytes(folder / file.relative_to(saved), file.read_bytes())
    # DVC keeps a relative path relative, so it stays valid if both folders are moved together.
    cache = os.path.relpath((project_root() / ".dvc/cache").resolve(), folder.resolve())
    _run(*_DVC, "config", "--local", "cache.dir", cache, cwd=folder)
    if (saved / "dvc.lock").exists():
        _run(*_DVC, "checkout", *_STAGES, cwd=folder)
    say(
        f"restored run {known_id} in {folder}; run `dvc repro` there to make its reports again, "
        f"`git worktree remove {folder}` to delete it"
    )


def _find_run(client: MlflowClient, name: str) -> str:
    """The id of the run that has this id or provisional id, or the only one whose id begins so.

    Raises InputError.
    """
    run_id = find_run(client, name)
    if run_id is not None:
        return run_id
    candidates = runs_beginning_with(client, name)
    if len(candidates) > 1:
        raise InputError(f"run {name}: {len(candidates)} runs begin so; give more of the id")
    if not candidates:
        raise InputError(f"run {name}: the store has no such run; `mlflow ui` shows their ids")
    return candidates[0]


def _has_patch(client: MlflowClient, run_id: str) -> bool:
    return f"{REPRODUCE}/{_PATCH}" in {artifact.path for artifact in client.list_artifacts(run_id, REPRODUCE)}


def _run(*command: str, cwd: Path | None = None) -> None:
    """Run a command. Raises ResourceError with the last line of its error output."""
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ResourceError(f"`{command[0]}` cannot be started: {error.strerror}; install it") from error
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ResourceError(f"`{' '.join(command)}` failed: {reason}")

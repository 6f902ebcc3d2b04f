"""From a run of the record back to its code, parameters, data and model, in a folder of their own."""

import subprocess
import sys
from pathlib import Path

from gptpipe.base.files import write_bytes
from gptpipe.record.store import REPRODUCE, connect, find_run, store_errors
from gptpipe.shell.console import say
from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import InputError, ResourceError

_DVC = (sys.executable, "-m", "dvc")  # also where no environment is activated
_STAGES = ("collect", "tokenize", "split", "train")  # dvc.lock was kept while evaluate ran, which is not in it


def restore(run_id: str, folder: Path) -> None:
    """Make a git worktree of the run's commit in `folder`, with the run's changes, its dvc.lock, data and model.

    Data and model come from DVC's cache of this project. Raises InputError, ResourceError.
    """
    with store_errors():
        client = connect()
        if (found := find_run(client, run_id)) is None:
            raise InputError(f"run {run_id}: the store has no such run; `mlflow ui` shows their ids")
        run_id = found
        commit = client.get_run(run_id).data.tags.get("mlflow.source.git.commit")
        if commit is None or f"{REPRODUCE}/code.patch" not in {
            x.path for x in client.list_artifacts(run_id, REPRODUCE)
        }:
            raise InputError(f"run {run_id}: does not keep its code: it was started outside git, or changes over 1 MB")
        source = Path(client.download_artifacts(run_id, REPRODUCE))
    _run("git", "worktree", "add", "--detach", str(folder), commit)
    _run("git", "-C", str(folder), "apply", "--allow-empty", str(source / "code.patch"))
    for file in sorted(path for path in source.rglob("*") if path.is_file() and path.name != "code.patch"):
        write_bytes(folder / file.relative_to(source), file.read_bytes())
    _run(*_DVC, "config", "--local", "cache.dir", str(project_root() / ".dvc" / "cache"), cwd=folder)
    if (source / "dvc.lock").exists():
        _run(*_DVC, "checkout", *_STAGES, cwd=folder)
    say(f"restored run {run_id} in {folder}; `dvc repro` there has the reports again, `git worktree remove` drops it")


def _run(*command: str, cwd: Path | None = None) -> None:
    """Run a command. Raises ResourceError with the last line of its error output."""
    try:
        done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ResourceError(f"`{command[0]}` cannot be started: {error.strerror}; install it") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ResourceError(f"`{' '.join(command)}` failed: {reason}")

"""`gptpipe doctor`: checks everything that the project keeps, and prints one line per check with its fix.

It changes nothing, and needs neither a network nor anything made yet. With --fix it repairs what can be
repaired without loss. With --remove-checkpoints it removes abandoned trainings. No file or process that it
looks at can end it with a traceback.
"""

import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, ParamSpec

import psutil
from filelock import FileLock, Timeout
from mlflow.tracking import MlflowClient

from gptpipe import __version__
from gptpipe.base.finished_training import discard
from gptpipe.base.manifest import read_manifest, verify
from gptpipe.commands import dvc_state, store_state
from gptpipe.commands.findings import NOT_MADE, Finding, ok, problem, warning
from gptpipe.commands.store_state import MODEL, REPORTS
from gptpipe.evaluate.registry import CHAMPION
from gptpipe.evaluate.report import read_training_reports
from gptpipe.params import load_params
from gptpipe.record.store import without_credentials
from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import GptpipeError, IntegrityError, ResourceError, first_line, one_line
from gptpipe.shell.locks import remove_free_lock
from gptpipe.train.earlier_trainings import abandoned_trainings

Arguments = ParamSpec("Arguments")
# Name of an artefact, as in `made_from` of the next one's manifest -> its folder.
_FOLDERS = {
    "raw": Path("data/raw"),
    "tokens": Path("data/tokens"),
    "split": Path("data/split"),
    "gpt": MODEL,
    "state": Path("models/state"),
}
_LEAST_FREE = 1 << 30  # bytes of disk


def doctor(*, fix: bool, remove_checkpoints: bool = False) -> int:
    """Run all checks and print their findings; returns the exit code.

    It is 0, or the lowest exit code of the errors: damage (4) goes before a store that is down (5).
    """
    report, processes, store = _Report(), _Processes(), store_state.Store()
    report.add("params.yaml", _check_params)
    for name, folder in _FOLDERS.items():
        report.add(str(folder), _check_folder, name)
    report.add("reports", _check_reports)
    dvc_lock = report.add("dvc.lock", dvc_state.check_lock, fix=fix)
    report.add(".gitignore", dvc_state.check_gitignores, fix=fix)
    report.add("stages", _check_stages, processes)
    if processes.are_idle:  # otherwise, these files may be in use
        report.add("rwlock", dvc_state.check_rwlock, fix=fix)
        report.add("cache", dvc_state.check_cache, fix=fix)
        report.add("experiments", dvc_state.check_workspaces, processes.folders, fix=fix)
        report.add("leftovers", _check_leftovers, fix=fix)
        report.add("locks", _check_locks, fix=fix)
        report.add("checkpoints", _check_checkpoints)
        report.add("abandoned", _check_abandoned, remove=remove_checkpoints)
    report.add("worktrees", dvc_state.check_worktrees, fix=fix)
    report.add("pipeline", _check_pipeline, dvc_lock, processes)
    report.add("versions", _check_versions)
    report.add("disk", _check_disk)
    report.add("store", store.check)
    if store.client:
        artifacts = report.add("artifacts", store_state.check_locations, fix=fix)
    report.add("outbox", store_state.check_outbox, store.client, fix=fix)
    if store.client:
        report.add("workspace", store_state.check_workspace, store.client)
        report.add("runs", _check_runs, store.client, processes, fix=fix)
        report.add(CHAMPION, _check_champion, store.client, artifacts)
    return report.exit_code


class _Report:
    """Runs checks, prints what they find, and keeps the exit code."""

    def __init__(self) -> None:
        self._error_codes: set[int] = set()

    @property
    def exit_code(self) -> int:
        return min(self._error_codes, default=0)

    def add(
        self, name: str, check: Callable[Arguments, Finding], *args: Arguments.args, **options: Arguments.kwargs
    ) -> Finding:
        """Run one check and print its finding. An exception of the check is an error."""
        try:
            finding = check(*args, **options)
        except GptpipeError as error:
            finding = Finding("error", first_line(error), exit_code=error.exit_code)
        except OSError as error:
            reason = f"{error.filename or name}: {error.strerror or error}"
            finding = problem(ResourceError, reason, "fix the permissions or the disk")
        except Exception as error:  # a check that fails must not hide what the others find
            reason = f"{type(error).__name__}: {first_line(error)[:200]}"
            finding = problem(ResourceError, f"this check failed ({reason})")
        if finding.status == "error":
            self._error_codes.add(finding.exit_code)
        print(one_line(f"{finding.status:<8} {name:<12} {without_credentials(str(finding))}"), flush=True)
        return finding


class _Process(NamedTuple):
    command: list[str]
    folder: Path
    pid: int


class _Processes:
    """Running processes whose current folder is in this project, or in one of DVC's copies of it."""

    @cached_property
    def _all(self) -> list[_Process]:
        root = project_root().resolve()
        processes = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            folder = Path(process.info["cwd"] or "/")  # the system may not reveal it
            if folder.is_relative_to(root):
                processes.append(_Process(process.info["cmdline"] or [], folder, process.pid))
        return processes

    @property
    def folders(self) -> list[Path]:
        return [process.folder for process in self._all]

    @property
    def stages(self) -> list[str]:
        """Stages that are running, each with its process id."""
        return [
            f"{word} as process {process.pid}"
            for process in self._all
            for word in process.command
            if word.startswith("stages.")
        ]

    @property
    def include_dvc(self) -> bool:
        """Whether a `dvc` command is running."""
        return any(Path(word).name == "dvc" for process in self._all for word in process.command[:3])

    @property
    def are_idle(self) -> bool:
        """Whether certainly neither a stage nor a `dvc` command is running."""
        try:
            return not self.stages and not self.include_dvc
        except (psutil.Error, OSError):
            return False


def _check_params() -> Finding:
    return ok(f"all values are valid, seed {load_params().seed}")


def _check_folder(name: str) -> Finding:
    """Every file of an artefact matches its manifest, and the artefacts it was made from are unchanged."""
    folder = _FOLDERS[name]
    if not folder.exists():
        return NOT_MADE
    manifest = verify(folder)
    for parent, digest in sorted(manifest.made_from.items()):
        parent_folder = _FOLDERS.get(parent)
        if parent_folder and parent_folder.exists() and read_manifest(parent_folder).digest != digest:
            return problem(
                IntegrityError, f"made from another {parent_folder} than the present one", "run `dvc repro`"
            )
    return ok(f"{len(manifest.files)} files match the manifest, made from the data in this workspace")


def _check_reports() -> Finding:
    if not MODEL.exists():
        return NOT_MADE
    read_training_reports(REPORTS, MODEL)
    return ok("the reports of stage train match the model's manifest")


def _check_stages(processes: _Processes) -> Finding:
    return ok(f"running: {', '.join(processes.stages) or 'none'}")


def _check_leftovers(*, fix: bool) -> Finding:
    """Partial files of killed processes. Those of stages stay, because a rerun may resume from them."""
    root = project_root()
    of_store = sorted({*(root / ".gptpipe").rglob(".*.partial"), *root.glob(".mlflow.db.*.partial*")})
    if of_store and not fix:
        return warning(
            f"{len(of_store)} partial files of killed processes, for example {of_store[0]}",
            "`gptpipe doctor --fix` removes them",
        )
    for path in of_store:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folders = (Path("data"), Path("models"), REPORTS)
    of_stages = sorted(path for folder in folders for path in folder.rglob(".*.partial"))
    if of_stages:
        return warning(
            f"{len(of_stages)} partial files of killed processes, for example {of_stages[0]}",
            "the next run of their stage removes them or resumes from them",
        )
    return ok(f"removed {len(of_store)}" if of_store else "none")


def _check_locks(*, fix: bool) -> Finding:
    """Lock files that killed processes left. A free lock blocks nobody, and a held one is in use."""
    locks = list(_lock_files())
    if fix:
        n_removed = sum(map(remove_free_lock, locks))
        return ok(f"removed {n_removed} that no process held" if locks else "none is left over")
    free = [path for path in locks if _is_free(path)]
    if free:
        return warning(
            f"{len(free)} that no process holds, for example {free[0]}", "`gptpipe doctor --fix` removes them"
        )
    return ok("none is left over")


def _lock_files() -> Iterator[Path]:
    yield from sorted(Path().glob(".*.lock"))
    for folder in (Path("data"), Path("models"), REPORTS, project_root() / ".gptpipe"):
        yield from sorted(folder.rglob(".*.lock"))


def _is_free(path: Path) -> bool:
    """Whether no process holds a lock file."""
    try:
        with FileLock(path, timeout=0):
            return True
    except Timeout:
        return False


def _check_checkpoints() -> Finding:
    checkpoints = sorted((project_root() / ".gptpipe/checkpoints").glob("*/*-*/"))
    for checkpoint in checkpoints:
        try:
            verify(checkpoint)
        except IntegrityError as error:
            return problem(
                IntegrityError,
                str(error).split(";")[0],
                f"`dvc repro` resumes from the one before, or remove {checkpoint.parent}",
            )
    if not checkpoints:
        return ok("none")
    return ok(f"{len(checkpoints)} are intact; `dvc repro` with the same parameters resumes from the last")


def _check_abandoned(*, remove: bool) -> Finding:
    """Trainings that were stopped, and that no training with the present parameters would continue."""
    trainings = abandoned_trainings(project_root() / ".gptpipe/checkpoints", load_params())
    total = f"{len(trainings)}, {sum(training.n_bytes for training in trainings) / 2**20:,.1f} MiB"
    if remove:
        for training in trainings:
            discard(training.folder)
        return ok(f"removed {total}" if trainings else "none")
    if trainings:
        return warning(
            f"trainings that these parameters do not continue ({total}): {', '.join(map(str, trainings))}",
            "set the parameters back or set train.continue_from to continue one; "
            "`gptpipe doctor --remove-checkpoints` removes them",
        )
    return ok("none")


def _check_pipeline(dvc_lock: Finding, processes: _Processes) -> Finding:
    if dvc_lock.status == "error":
        return ok("not checked, because `dvc status` cannot read dvc.lock")
    has_outputs = any(folder.exists() for folder in _FOLDERS.values())
    return dvc_state.check_pipeline(has_outputs=has_outputs, other_dvc_runs=processes.include_dvc)


def _check_versions() -> Finding:
    """Installed packages have the versions of constraints.txt, and `gptpipe` runs this project's code."""
    code = project_root() / "gptpipe"
    if code.is_dir() and code.resolve() != Path(__file__).resolve().parents[1]:
        return warning(
            f"`gptpipe` runs the code in {Path(__file__).resolve().parents[2]}, not that of this project",
            "run `pip install -c constraints.txt -e .` here",
        )
    pins = project_root() / "constraints.txt"
    lines = pins.read_bytes().decode(errors="replace").splitlines() if pins.exists() else []
    expected = [(name, pinned) for name, _, pinned in (line.partition("==") for line in lines)]
    different = []
    for name, pinned in [*expected, ("gptpipe", __version__)]:
        with suppress(PackageNotFoundError, ValueError):  # a package of an extra; a comment
            installed = version(name)
            if installed.split("+")[0] != pinned:
                different.append(f"{name} {installed}, not {pinned}")
    if different:
        return warning(
            f"{'; '.join(different[:5])} ({len(different)} in all)", "run `pip install -c constraints.txt -e .`"
        )
    return ok(f"as in constraints.txt: torch {version('torch')}, on Python {platform.python_version()}")


def _check_disk() -> Finding:
    root = project_root()
    free = psutil.disk_usage(str(root)).free
    if free < _LEAST_FREE:
        text = f"only {free / 2**20:,.0f} MiB are free at {root}"
        return problem(ResourceError, text, f"free {_LEAST_FREE >> 20:,} MiB")
    return ok(f"{free / 2**30:,.1f} GiB free")


def _check_runs(client: MlflowClient, processes: _Processes, *, fix: bool) -> Finding:
    return store_state.check_runs(client, stages_run=bool(processes.stages), fix=fix)


def _check_champion(client: MlflowClient, artifacts: Finding) -> Finding:
    if artifacts.status == "error":
        return ok("not checked, because the store names the folder before the move")
    return store_state.check_champion(client)

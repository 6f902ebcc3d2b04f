"""`gptpipe doctor`: checks everything that the project keeps, one line per check, each finding with its remedy.

It changes nothing, and needs neither a network nor anything made yet. With --fix it repairs what can be repaired
without loss. No file or process that it looks at can end it with a traceback.
"""

import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import psutil
from filelock import FileLock, Timeout
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from gptpipe import __version__
from gptpipe.base.manifest import read_manifest, verify
from gptpipe.commands import dvc_state
from gptpipe.evaluate.registry import CHAMPION, MODEL_DIGEST, MODEL_NAME, stored_model
from gptpipe.evaluate.report import read_training_reports
from gptpipe.params import load_params
from gptpipe.record.outbox import send_outbox
from gptpipe.record.store import find_run, read_run_id, store_errors, without_credentials
from gptpipe.shell.console import printable
from gptpipe.shell.environment import experiment_name, project_root, tracking_uri
from gptpipe.shell.errors import GptpipeError, IntegrityError, ResourceError, first_line
from gptpipe.shell.locks import remove_free_lock

_MADE = {"raw": Path("data/raw"), "tokens": Path("data/tokens"), "split": Path("data/split"), "gpt": Path("models/gpt")}
_REPORTS = Path("reports")
_NOT_MADE = "nothing made yet; `dvc repro` makes it, `dvc pull` fetches what was pushed"
_LEAST_FREE = 1 << 30  # bytes of disk


def doctor(*, fix: bool) -> int:
    """Print what each check says; returns 0, or the exit code of the worst error: 4 goes before 5."""
    codes = {0}
    for name, check in _checks(_Project(fix=fix)):
        try:
            mark, text = "ok", check()
        except UserWarning as doubt:  # nothing is broken, but someone should look
            mark, text = "warning", str(doubt)
        except GptpipeError as error:
            codes.add(error.exit_code)
            mark, text = "error", first_line(error)
        except OSError as error:
            codes.add(ResourceError.exit_code)
            reason = f"{error.filename or name}: {error.strerror or error}"
            mark, text = "error", f"{reason}; fix the permissions or the disk"
        except Exception as error:  # a check that fails must not hide what the others find
            codes.add(ResourceError.exit_code)
            mark, text = "error", f"this check failed ({type(error).__name__}: {first_line(error)[:200]})"
        print(printable(f"{mark:<8} {name:<12} {without_credentials(text)}"), flush=True)
    return min(codes - {0}, default=0)


class _Project:
    """What the checks share."""

    def __init__(self, *, fix: bool) -> None:
        self.fix = fix
        self.client: MlflowClient | None = None  # none where the store fails, or has none of our runs
        self.is_readable_by_dvc = True

    @property
    def state(self) -> Path:
        return project_root() / ".gptpipe"

    @cached_property
    def processes(self) -> list[tuple[list[str], Path, int]]:
        """Command line, folder and number of each process in this project, also in DVC's copies of it."""
        root, found = project_root().resolve(), []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            folder = Path(process.info["cwd"] or "/")  # none where the system does not tell
            if folder.is_relative_to(root):
                found.append((process.info["cmdline"] or [], folder, process.pid))
        return found

    @cached_property
    def stages(self) -> list[str]:
        """Stages at work."""
        named = ((word, pid) for words, _, pid in self.processes for word in words if word.startswith("stages."))
        return [f"{stage} as process {pid}" for stage, pid in named]

    @property
    def runs_dvc(self) -> bool:
        """Whether a `dvc` command is at work."""
        return any(Path(word).name == "dvc" for words, _, _ in self.processes for word in words[:3])

    @property
    def is_idle(self) -> bool:
        """Whether certainly neither a stage nor a `dvc` command is at work."""
        try:
            return not self.stages and not self.runs_dvc
        except (psutil.Error, OSError):
            return False


def _checks(project: _Project) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names, and functions that return what is well and raise what is not."""
    yield "params.yaml", lambda: f"every value is sound, seed {load_params().seed}"
    for name, folder in _MADE.items():
        yield str(folder), partial(_artefact, name)
    yield "reports", _reports
    yield "dvc.lock", partial(_dvc_lock, project)
    yield ".gitignore", partial(dvc_state.check_ignored, fix=project.fix)
    yield "stages", lambda: f"at work: {', '.join(project.stages) or 'none'}"
    if project.is_idle:  # else what lies about may be in use
        yield "rwlock", partial(dvc_state.check_rwlock, fix=project.fix)
        yield "cache", partial(dvc_state.check_cache, fix=project.fix)
        folders = [folder for _, folder, _ in project.processes]
        yield "experiments", partial(dvc_state.check_workspaces, folders, fix=project.fix)
        yield "leftovers", partial(_leftovers, project)
        yield "locks", partial(_locks, project)
        yield "checkpoints", _checkpoints
    yield "worktrees", partial(dvc_state.check_worktrees, fix=project.fix)
    yield "pipeline", partial(_pipeline, project)
    yield "versions", _versions
    yield "disk", _disk
    yield "store", partial(_store, project)
    yield "outbox", partial(_outbox, project)
    if project.client:
        yield "workspace", partial(_workspace, project.client)
        yield "runs", partial(_runs, project, project.client)
        yield CHAMPION, partial(_champion, project.client)


def _artefact(name: str) -> str:
    if not _MADE[name].exists():
        return _NOT_MADE
    manifest = verify(_MADE[name])
    for parent, digest in sorted(manifest.made_from.items()):
        if (path := _MADE.get(parent)) and path.exists() and read_manifest(path).digest != digest:
            raise IntegrityError(f"made from another {path} than lies here; run `dvc repro`")
    return f"{len(manifest.files)} files are as the manifest says, made from what lies here"


def _reports() -> str:
    if not _MADE["gpt"].exists():
        return _NOT_MADE
    read_training_reports(_REPORTS, _MADE["gpt"])
    return "those of stage train are as the model's manifest says"


def _dvc_lock(project: _Project) -> str:
    try:
        return dvc_state.check_lock(fix=project.fix)
    except GptpipeError:
        project.is_readable_by_dvc = False
        raise


def _pipeline(project: _Project) -> str:
    if not project.is_readable_by_dvc:
        return "not asked, for `dvc status` cannot read dvc.lock"
    try:
        changed = dvc_state.changed_stages()
    except ResourceError as error:
        if project.runs_dvc:
            raise UserWarning(f"{error}, while another dvc command is at work") from error
        raise
    if changed and any(folder.exists() for folder in _MADE.values()):
        raise UserWarning(f"not as in dvc.lock: {', '.join(changed)}; `dvc status` says what, `dvc repro` runs it")
    return _NOT_MADE if changed else "the workspace is as in dvc.lock"


def _leftovers(project: _Project) -> str:
    """Files and folders of killed processes. Those of stages stay, because a rerun may resume from them."""
    of_store = sorted({*project.state.rglob(".*.partial"), *project_root().glob(".mlflow.db.*.partial*")})
    if project.fix:
        for path in of_store:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif of_store:
        raise UserWarning(
            f"{len(of_store)}, as {of_store[0]}, of killed processes; `gptpipe doctor --fix` removes them"
        )
    of_stages = sorted(path for place in ("data", "models", "reports") for path in Path(place).rglob(".*.partial"))
    if of_stages:
        raise UserWarning(
            f"{len(of_stages)}, as {of_stages[0]}, of killed processes; the next run of their stage clears them up"
        )
    return f"removed {len(of_store)}" if of_store else "none"


def _locks(project: _Project) -> str:
    """Lock files of killed processes, which nobody holds. They stop nobody; a held one is somebody's."""
    places = (Path("data"), Path("models"), Path("reports"), project.state)
    locks = [*sorted(Path().glob(".*.lock")), *(path for place in places for path in sorted(place.rglob(".*.lock")))]
    if project.fix:
        return f"removed {sum(map(remove_free_lock, locks))} that nobody held" if locks else "none is left over"
    if free := [path for path in locks if _is_free(path)]:
        raise UserWarning(f"{len(free)}, as {free[0]}, that nobody holds; `gptpipe doctor --fix` removes them")
    return "none is left over"


def _is_free(path: Path) -> bool:
    """Whether no process holds a lock file."""
    try:
        with FileLock(path, timeout=0):
            return True
    except Timeout:
        return False


def _checkpoints() -> str:
    states = sorted((project_root() / ".gptpipe/checkpoints").glob("*/*-*/"))
    for state in states:
        try:
            verify(state)
        except IntegrityError as error:
            what, remedy = str(error).split(";")[0], "`dvc repro` resumes from the one before"
            raise IntegrityError(f"{what}; {remedy}, or remove {state.parent}") from error
    return f"{len(states)} are sound; `dvc repro` with their parameters goes on" if states else "none"


def _versions() -> str:
    pins = project_root() / "constraints.txt"
    lines = pins.read_bytes().decode(errors="replace").splitlines() if pins.exists() else []
    other = []
    for name, _, exact in [*(line.partition("==") for line in lines), ("gptpipe", "", __version__)]:
        with suppress(PackageNotFoundError, ValueError):  # of an extra; a comment
            if (found := version(name)).split("+")[0] != exact:
                other.append(f"{name} {found}, not {exact}")
    if other:
        raise UserWarning(f"{'; '.join(other[:5])} ({len(other)} in all); run `pip install -c constraints.txt -e .`")
    return f"as in constraints.txt: torch {version('torch')}, on Python {platform.python_version()}"


def _disk() -> str:
    if (free := psutil.disk_usage(str(project_root())).free) < _LEAST_FREE:
        raise ResourceError(f"{free / 2**20:,.0f} MiB are free at {project_root()}; free {_LEAST_FREE >> 20:,} MiB")
    return f"{free / 2**30:,.1f} GiB free"


def _store(project: _Project) -> str:
    """Sets the project's client if there is a store with our experiment; creates neither."""
    file = Path((uri := tracking_uri()).removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.exists():
        return "none yet; the first training makes it"
    try:
        if uri.startswith("sqlite:///"):  # MLflow would try a damaged file for minutes
            with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
                if (found := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise sqlite3.DatabaseError(found)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = MlflowClient(uri)
        if client.get_experiment_by_name(experiment_name()):  # the error for an old schema names its remedy
            project.client = client
    except (MlflowException, OSError, ValueError, ImportError, sqlite3.Error) as error:
        kind = IntegrityError if type(error) is sqlite3.DatabaseError else ResourceError
        raise kind(f"{uri}: {first_line(error)[:200]}; start its server, or put back a copy of its file") from error
    return f"{uri} answers" + ("" if project.client else f", without an experiment {experiment_name()} so far")


def _outbox(project: _Project) -> str:
    outbox = project.state / "outbox"
    if project.fix and project.client:
        send_outbox()
    if waiting := sorted(outbox.glob("*.jsonl")):
        raise UserWarning(
            f"{len(waiting)}, as {waiting[0]}, of runs; the next one or `gptpipe doctor --fix` sends them"
        )
    if aside := sorted([*outbox.glob("*.damaged"), *outbox.glob("*.refused")]):
        raise UserWarning(f"{len(aside)}, as {aside[0]}, that cannot be sent; look at them, then remove them")
    return "none"


@store_errors()
def _workspace(client: MlflowClient) -> str:
    if not (path := _REPORTS / "mlflow_run.json").exists() and not _MADE["gpt"].exists():
        return _NOT_MADE
    run_id = read_run_id(path)
    if find_run(client, run_id) is None:
        raise UserWarning(f"{path}: the store has no run {run_id}; `dvc repro -fs evaluate` makes one in its place")
    return f"{path}: run {run_id}"


@store_errors()
def _runs(project: _Project, client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name(experiment_name())
    running = client.search_runs([getattr(experiment, "experiment_id", "")], "attributes.status = 'RUNNING'")
    gone = [] if project.stages else [run.info.run_id for run in running if _is_gone(run)]
    for run_id in gone if project.fix else ():
        client.set_terminated(run_id, status="KILLED")
    if gone and not project.fix:
        raise UserWarning(f"{len(gone)} run without a process: {gone[0]} ...; `gptpipe doctor --fix` closes them")
    return f"running: {len(running) - len(gone)}" + (f"; closed as KILLED: {len(gone)}" if gone else "")


def _is_gone(run: Run) -> bool:
    """Whether a run was started on this machine by a process that is gone; its number may be another's by now."""
    number, _, machine = run.data.tags.get("process", "").partition(" on ")
    try:
        return machine == platform.node() and psutil.Process(int(number)).create_time() > run.info.start_time / 1000
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, ValueError, OverflowError):  # no number, or the system does not tell
        return False


def _champion(client: MlflowClient) -> str:
    with store_errors():
        if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
            return "no model is registered yet"
        number = client.get_registered_model(MODEL_NAME).aliases.get(CHAMPION)
        if number is None:
            raise IntegrityError(f"no version of {MODEL_NAME} is the {CHAMPION}; `dvc repro -fs evaluate` chooses one")
        champion = client.get_model_version(MODEL_NAME, number)
        location = client.get_model_version_download_uri(MODEL_NAME, number)
    try:
        with TemporaryDirectory() as folder:
            verify(stored_model(location, Path(folder)))
    except (GptpipeError, MlflowException, OSError) as error:
        what = f"version {number}: {first_line(error).split('; ')[0][:200]}"
        is_here = _MADE["gpt"].exists() and read_manifest(_MADE["gpt"]).digest == champion.tags.get(MODEL_DIGEST)
        remedy = "`dvc repro -fs evaluate` uploads it again"
        if not is_here:
            remedy = (
                f"it is not the model in {_MADE['gpt']}: `gptpipe restore {champion.run_id}`, then evaluate it there"
            )
        raise IntegrityError(f"{what}; {remedy}") from error
    return f"{MODEL_NAME} version {number}, every file is as its manifest says"

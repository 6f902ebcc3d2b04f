"""`gptpipe doctor`: the whole record looked over, one line a check that says how to mend what it finds.

It changes nothing and needs neither a network nor anything made yet. Asked to fix, it does what cannot do harm.
Locks are not looked for: the system frees each with its process.
"""

import json
import platform
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlflow
import psutil
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from gptpipe import __version__
from gptpipe.config import load_params
from gptpipe.console import printable
from gptpipe.environment import experiment_name, project_root, tracking_uri
from gptpipe.errors import GptpipeError, IntegrityError, ResourceError, first_line
from gptpipe.files import read_manifest, verify
from gptpipe.tracking.record import send_outbox
from gptpipe.tracking.registry import CHAMPION, MODEL_NAME
from gptpipe.tracking.store import find_run, store_errors

_MADE = {"raw": Path("data/raw"), "tokens": Path("data/tokens"), "split": Path("data/split"), "gpt": Path("models/gpt")}
_NOT_MADE = "nothing made yet; `dvc repro` makes it, `dvc pull` fetches what was pushed"
_LEAST_FREE = 1 << 30  # bytes of disk


def doctor(*, fix: bool) -> int:
    """Print what each check says; returns 0, or the exit code of the worst error: 4 goes before 5."""
    codes = {0}
    for name, check in _checks(fix):
        try:
            mark, text = "ok", check()
        except UserWarning as doubt:  # nothing is broken, but someone should look
            mark, text = "warning", str(doubt)
        except GptpipeError as error:
            codes.add(error.exit_code)
            mark, text = "error", first_line(error)
        print(printable(f"{mark:<8} {name:<12} {text}"), flush=True)
    return min(codes - {0}, default=0)


def _checks(fix: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names, and functions that return what is well and raise what is not."""
    yield "params.yaml", lambda: f"every value is sound, seed {load_params().seed}"
    for name, folder in _MADE.items():
        yield str(folder), partial(_artefact, name)
    yield "pipeline", _pipeline
    state, busy = project_root() / ".gptpipe", _stages_at_work()
    yield "stages", lambda: f"at work: {', '.join(busy) or 'none'}"
    if not busy:  # what they have in hand is theirs
        partials = (path for place in ("data", "models", "reports", state) for path in Path(place).rglob(".*.partial"))
        yield "leftovers", partial(_none, partials, "of killed processes; the next run of their stage clears them up")
        yield "checkpoints", _checkpoints
    yield "versions", _versions
    yield "disk", _disk
    clients: list[MlflowClient] = []  # none where the store fails or is not there
    yield "store", lambda: _store(clients)
    if fix and clients:
        send_outbox()
    waiting = (state / "outbox").glob("*.jsonl")
    yield "outbox", partial(_none, waiting, "of runs; the next one or `gptpipe doctor --fix` sends them")
    for client in clients:
        yield "workspace", partial(_workspace, client)
        yield "runs", partial(_runs, client, bool(busy), fix)
        yield CHAMPION, partial(_champion, client)


def _artefact(name: str) -> str:
    if not _MADE[name].exists():
        return _NOT_MADE
    manifest = verify(_MADE[name])
    for parent, digest in sorted(manifest.made_from.items()):
        if (path := _MADE.get(parent)) and path.exists() and read_manifest(path).digest != digest:
            raise IntegrityError(f"made from another {path} than lies here; run `dvc repro`")
    return f"{len(manifest.files)} files are as the manifest says, made from what lies here"


def _pipeline() -> str:
    asked = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True)
    if asked.returncode:
        raise UserWarning(f"`dvc status` fails: {(asked.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    if (changed := json.loads(asked.stdout)) and any(folder.exists() for folder in _MADE.values()):
        raise UserWarning(f"not as in dvc.lock: {', '.join(changed)}; `dvc status` says what, `dvc repro` runs it")
    return _NOT_MADE if changed else "the workspace is as in dvc.lock"


def _stages_at_work() -> list[str]:
    """Processes of the stages here, also in the copies of the project that DVC makes below `.dvc/tmp`."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        stage = next((word for word in process.info["cmdline"] or () if word.startswith("stages.")), None)
        if stage and Path(process.info["cwd"] or "/").is_relative_to(project_root().resolve()):
            found.append(f"{stage} as process {process.pid}")
    return found


def _none(paths: Iterable[Path], remedy: str) -> str:
    if found := sorted(paths):
        raise UserWarning(f"{len(found)}, as {found[0]}, {remedy}")
    return "none"


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
    lines, other = pins.read_text().splitlines() if pins.exists() else [], []
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


def _store(clients: list[MlflowClient]) -> str:
    """Puts a client into `clients` if there is a store with our experiment; makes neither."""
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
        if (client := MlflowClient(uri)).get_experiment_by_name(experiment_name()):  # an old schema says its remedy
            clients.append(client)
    except (MlflowException, OSError, sqlite3.Error) as error:
        kind = IntegrityError if type(error) is sqlite3.DatabaseError else ResourceError
        raise kind(f"{uri}: {first_line(error)[:200]}; start its server, or put back a copy of its file") from error
    return f"{uri} answers" + ("" if clients else f", without an experiment {experiment_name()} so far")


@store_errors()
def _workspace(client: MlflowClient) -> str:
    if not (path := Path("reports/mlflow_run.json")).exists():
        return _NOT_MADE
    run_id = json.loads(path.read_bytes())["run_id"]
    if find_run(client, run_id) is None:
        raise UserWarning(f"{path}: the store has no run {run_id}; `dvc repro -fs evaluate` makes one in its place")
    return f"{path}: run {run_id}"


@store_errors()
def _runs(client: MlflowClient, is_busy: bool, fix: bool) -> str:
    experiment = client.get_experiment_by_name(experiment_name())
    running = client.search_runs([getattr(experiment, "experiment_id", "")], "attributes.status = 'RUNNING'")
    gone = [] if is_busy else [run.info.run_id for run in running if _is_gone(run)]
    for run_id in gone if fix else ():
        client.set_terminated(run_id, status="KILLED")
    if gone and not fix:
        raise UserWarning(f"{len(gone)} run without a process: {gone[0]} ...; `gptpipe doctor --fix` closes them")
    return f"running: {len(running) - len(gone)}" + (f"; closed as KILLED: {len(gone)}" if gone else "")


def _is_gone(run: Run) -> bool:
    """Whether a run was started on this machine by a process that is no more; its number may be another's by now."""
    number, _, machine = run.data.tags.get("process", "").partition(" on ")
    try:
        return machine == platform.node() and psutil.Process(int(number)).create_time() > run.info.start_time / 1000
    except psutil.NoSuchProcess:
        return True


def _champion(client: MlflowClient) -> str:
    try:
        if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
            return "no model is registered yet"
        number = client.get_model_version_by_alias(MODEL_NAME, CHAMPION).version
        uri = client.get_model_version_download_uri(MODEL_NAME, number)
        folder = mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/artifacts/gpt", tracking_uri=tracking_uri())
    except (MlflowException, OSError) as error:
        raise IntegrityError(f"{first_line(error)[:200]}; `dvc repro -fs evaluate` registers the model anew") from error
    verify(Path(folder))
    return f"{MODEL_NAME} version {number}, every file is as its manifest says"

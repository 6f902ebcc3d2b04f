"""`gptpipe doctor`: the whole record looked over, one line a check that says how to mend what it finds.

It changes nothing and needs neither a network nor anything made yet. Asked to fix, it does what cannot do harm.
"""

import json
import platform
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlflow
import psutil
from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

import gptpipe
from gptpipe.config import load_params
from gptpipe.environment import experiment_name, project_root, tracking_uri
from gptpipe.errors import GptpipeError, IntegrityError, ResourceError, first_line
from gptpipe.files import read_manifest, verify
from gptpipe.tracking.record import send_outbox
from gptpipe.tracking.registry import CHAMPION, MODEL_NAME
from gptpipe.tracking.store import find_run, store_errors

_MADE = {"raw": Path("data/raw"), "tokens": Path("data/tokens"), "split": Path("data/split"), "gpt": Path("models/gpt")}
_NOT_MADE = "nothing made yet; `dvc repro` makes it, `dvc pull` fetches what was pushed"
_LEAST_FREE = 1 << 30  # bytes of disk


class _Doubt(GptpipeError):
    """Nothing is broken, but someone should look."""

    exit_code = 0


def doctor(*, fix: bool) -> int:
    """Print what each check says; returns 0, or the exit code of the worst error: 4 goes before 5."""
    codes = {0}
    for name, check in _checks(fix):
        try:
            mark, text = "ok", check()
        except GptpipeError as error:
            codes.add(error.exit_code)
            mark, text = "error" if error.exit_code else "warning", first_line(error)
        print(f"{mark:<8} {name:<12} {text}", flush=True)
    return min(codes - {0}, default=0)


def _checks(fix: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names, and functions that return what is well and raise what is not."""
    yield "params.yaml", lambda: f"every value is sound, seed {load_params().seed}"
    for name, folder in _MADE.items():
        yield str(folder), partial(_artefact, name)
    yield "pipeline", _pipeline
    busy = _stages_at_work()
    yield "stages", lambda: f"at work: {', '.join(busy) or 'none'}"
    if not busy:  # what they have in hand is theirs
        yield "leftovers", _leftovers
        yield "checkpoints", _checkpoints
    yield "versions", _versions
    yield "disk", _disk
    clients: list[MlflowClient] = []  # none where the store fails or is not there
    yield "store", lambda: _store(clients)
    yield "outbox", lambda: _outbox(fix and bool(clients))
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
        raise _Doubt(f"`dvc status` fails: {(asked.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    if not any(folder.exists() for folder in _MADE.values()):
        return _NOT_MADE
    if changed := json.loads(asked.stdout):
        raise _Doubt(f"not as in dvc.lock: {', '.join(changed)}; `dvc status` says what, `dvc repro` runs it again")
    return "the workspace is as in dvc.lock"


def _stages_at_work() -> list[str]:
    """Processes of the stages here, also in the copies of the project that DVC makes below `.dvc/tmp`."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        stage = next((word for word in process.info["cmdline"] or () if word.startswith("stages.")), None)
        if stage and Path(process.info["cwd"] or "/").is_relative_to(project_root().resolve()):
            found.append(f"{stage} as process {process.pid}")
    return found


def _leftovers() -> str:
    places = (Path("data"), Path("models"), Path("reports"), project_root() / ".gptpipe")
    if found := sorted(path for place in places for path in place.rglob(".*.partial")):
        raise _Doubt(f"{len(found)} of killed processes: {found[0]} ...; the next run of their stage clears them up")
    return "none"


def _checkpoints() -> str:
    states = sorted((project_root() / ".gptpipe/checkpoints").glob("*/*-*/"))
    for folder in {state.parent for state in states}:
        try:
            FileLock(folder / "lock").acquire(timeout=0).lock.release()
        except Timeout as error:
            raise _Doubt(f"{folder}: {(folder / 'owner').read_text()} trains, perhaps on another machine") from error
    for state in states:
        try:
            verify(state)
        except IntegrityError as error:
            what, remedy = str(error).split(";")[0], "`dvc repro` resumes from the one before"
            raise IntegrityError(f"{what}; {remedy}, or remove {state.parent}") from error
    return f"{len(states)} are sound; `dvc repro` with their parameters goes on" if states else "none"


def _versions() -> str:
    here, root = Path(gptpipe.__file__).resolve().parent.parent, project_root().resolve()
    if here != root and (root / "gptpipe").exists():
        raise _Doubt(f"this command runs the code of {here}, the stages that of {root}; run `pip install -e .` there")
    lines = (root / "constraints.txt").read_text().splitlines() if (root / "constraints.txt").exists() else []
    other = []
    for name, _, exact in [*(line.partition("==") for line in lines), ("gptpipe", "", gptpipe.__version__)]:
        with suppress(PackageNotFoundError, ValueError):  # of an extra; a comment
            if (found := version(name)).split("+")[0] != exact:
                other.append(f"{name} {found}, not {exact}")
    if other:
        raise _Doubt(f"{'; '.join(other[:5])} ({len(other)} in all); run `pip install -c constraints.txt -e .`")
    return f"as in constraints.txt: torch {version('torch')}, on Python {platform.python_version()}"


def _disk() -> str:
    if (free := shutil.disk_usage(project_root()).free) < _LEAST_FREE:
        raise ResourceError(f"{free / 2**20:,.0f} MiB are free at {project_root()}; free {_LEAST_FREE >> 20:,} MiB")
    return f"{free / 2**30:,.1f} GiB free"


def _store(clients: list[MlflowClient]) -> str:
    """Puts a client into `clients` if there is a store with our experiment; makes neither."""
    uri = tracking_uri()
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        if not file.exists():
            return "none yet; the first training makes it"
        try:
            with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
                state = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
        except sqlite3.DatabaseError as error:
            state = str(error)
        if state != "ok":
            raise IntegrityError(f"{file}: {state}; put a copy back, or move it away for the next run to make one")
    with store_errors():
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = MlflowClient(uri)
        if client.get_experiment_by_name(experiment_name()) is not None:  # an old schema raises, with its remedy
            clients.append(client)
    return f"{uri} answers" + ("" if clients else f", without an experiment {experiment_name()} so far")


def _outbox(send: bool) -> str:
    if send:
        send_outbox()
    folder = project_root() / ".gptpipe/outbox"
    if waiting := len(list(folder.glob("*.jsonl"))):
        raise _Doubt(f"records of {waiting} runs wait in {folder}; the next run or `gptpipe doctor --fix` sends them")
    return "empty"


def _workspace(client: MlflowClient) -> str:
    path = Path("reports/mlflow_run.json")
    if not path.exists():
        return _NOT_MADE
    run_id = json.loads(path.read_bytes())["run_id"]
    with store_errors():
        if find_run(client, run_id) is None:
            raise _Doubt(f"{path}: the store has no run {run_id}; `dvc repro -fs evaluate` makes one in its place")
    return f"{path}: run {run_id}"


def _runs(client: MlflowClient, is_busy: bool, fix: bool) -> str:
    with store_errors():
        experiment = client.get_experiment_by_name(experiment_name())
        ids = [experiment.experiment_id] if experiment else []
        running = client.search_runs(ids, "attributes.status = 'RUNNING'")
        gone = [] if is_busy else [run.info.run_id for run in running if _is_gone(run)]
        for run_id in gone if fix else ():
            client.set_terminated(run_id, status="KILLED")
    if gone and not fix:
        raise _Doubt(f"{len(gone)} run without a process: {gone[0]} ...; `gptpipe doctor --fix` closes them as KILLED")
    return f"running: {len(running) - len(gone)}" + (f"; closed as KILLED: {len(gone)}" if gone else "")


def _is_gone(run: mlflow.entities.Run) -> bool:
    """Whether a run was started on this machine by a process that is no more; its number may be another's by now."""
    number, _, machine = run.data.tags.get("process", "").partition(" on ")
    try:
        return machine == platform.node() and psutil.Process(int(number)).create_time() > run.info.start_time / 1000
    except psutil.NoSuchProcess:
        return True


def _champion(client: MlflowClient) -> str:
    with store_errors():
        if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
            return "no model is registered yet"
    try:
        number = client.get_model_version_by_alias(MODEL_NAME, CHAMPION).version
        uri = client.get_model_version_download_uri(MODEL_NAME, number)
        folder = mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/artifacts/gpt", tracking_uri=tracking_uri())
    except (MlflowException, OSError) as error:
        raise IntegrityError(f"{first_line(error)[:200]}; `dvc repro -fs evaluate` registers the model anew") from error
    verify(Path(folder))
    return f"{MODEL_NAME} version {number}, every file is as its manifest says"

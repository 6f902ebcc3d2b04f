"""Checks of `gptpipe doctor` on the MLflow store: that it answers, unsent records, runs, the champion model."""

import platform
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import psutil
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from gptpipe.base.manifest import read_manifest, verify
from gptpipe.commands.findings import NOT_MADE, Finding, ok, problem, warning
from gptpipe.evaluate.registry import CHAMPION, MODEL_DIGEST, MODEL_NAME
from gptpipe.record.outbox import current_files, other_stores, send_outbox
from gptpipe.record.sqlite_store import outdated_locations, sqlite_file, update_locations
from gptpipe.record.starting_model import MODEL_FOLDER, stored_folder
from gptpipe.record.store import find_run, read_run_id, store_errors
from gptpipe.shell.environment import experiment_name, tracking_uri
from gptpipe.shell.errors import GptpipeError, IntegrityError, ResourceError, first_line

MODEL, REPORTS = Path("models/gpt"), Path("reports")


class Store:
    """The tracking store. `client` is None unless `check` found a store that contains our experiment."""

    client: MlflowClient | None = None

    def check(self) -> Finding:
        """The store answers, and its schema is up to date. Creates neither the store nor the experiment."""
        uri = tracking_uri()
        try:
            file = sqlite_file(uri)
            if file and not file.exists():
                return ok("none yet; the first training makes it")
            if file:  # MLflow would retry on a damaged file for minutes
                _check_sqlite(file)
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            client = MlflowClient(uri)
            if not client.get_experiment_by_name(experiment_name()):
                return ok(f"{uri} answers, without an experiment {experiment_name()} so far")
        except (MlflowException, OSError, ValueError, ImportError, sqlite3.Error) as error:
            kind = IntegrityError if type(error) is sqlite3.DatabaseError else ResourceError
            reason = f"{uri}: {first_line(error)[:200]}"
            return problem(kind, reason, "start its server, or restore its file from a backup")
        self.client = client
        return ok(f"{uri} answers")


def _check_sqlite(file: Path) -> None:
    """Raises sqlite3.Error if the file is damaged."""
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
        result = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if result != "ok":
        raise sqlite3.DatabaseError(result)


def check_locations(*, fix: bool) -> Finding:
    """Artifacts of a SQLite store are where its database says, even if the project was moved or copied."""
    file = sqlite_file(tracking_uri())
    if file is None:
        return ok("the server keeps them")
    with store_errors():
        outdated = outdated_locations(file)
        if not outdated:
            return ok("the store's locations are up to date")
        if fix:
            return ok(f"updated {update_locations(file)} locations in {file}, which was moved or copied")
    example = outdated[0].old
    return problem(
        IntegrityError,
        f"{file}: {len(outdated)} locations are those before it was moved or copied, for example {example}",
        "`gptpipe doctor --fix` or the next run updates them",
    )


def check_outbox(client: MlflowClient | None, *, fix: bool) -> Finding:
    """Records of runs that their store did not take yet."""
    if fix and client:
        send_outbox()
    waiting = current_files("*.jsonl")
    if waiting:
        return warning(
            f"{len(waiting)} records of runs are not sent, for example {waiting[0]}",
            "the next run or `gptpipe doctor --fix` sends them",
        )
    for store, paths in other_stores().items():
        return warning(
            f"{len(paths)} records of runs wait for another store, {store}, for example {paths[0]}",
            "send them with its MLFLOW_TRACKING_URI, "
            "or move them one folder up to send them to the present store",
        )
    unsendable = [*current_files("*.damaged"), *current_files("*.refused")]
    if unsendable:
        return warning(
            f"{len(unsendable)} records of runs cannot be sent, for example {unsendable[0]}",
            "look at them, then remove them",
        )
    return ok("none")


@store_errors()
def check_workspace(client: MlflowClient) -> Finding:
    """The store has the run that reports/mlflow_run.json names."""
    path = REPORTS / "mlflow_run.json"
    if not path.exists() and not MODEL.exists():
        return NOT_MADE
    run_id = read_run_id(path)
    if find_run(client, run_id) is None:
        return warning(
            f"{path}: the store has no run {run_id}", "`dvc repro -fs evaluate` creates one in its place"
        )
    return ok(f"{path}: run {run_id}")


@store_errors()
def check_runs(client: MlflowClient, *, stages_run: bool, fix: bool) -> Finding:
    """Runs that MLflow calls RUNNING have a process. While stages run, none is called dead."""
    experiment = client.get_experiment_by_name(experiment_name())
    running = client.search_runs([getattr(experiment, "experiment_id", "")], "attributes.status = 'RUNNING'")
    dead = [] if stages_run else [run.info.run_id for run in running if _has_lost_its_process(run)]
    if dead and not fix:
        runs = "run has" if len(dead) == 1 else "runs have"
        return warning(
            f"{len(dead)} {runs} no process any more, for example {dead[0]}",
            "`gptpipe doctor --fix` closes them",
        )
    for run_id in dead:
        client.set_terminated(run_id, status="KILLED")
    closed = f"; closed as KILLED: {len(dead)}" if dead else ""
    return ok(f"running: {len(running) - len(dead)}{closed}")


def _has_lost_its_process(run: Run) -> bool:
    """Whether a process on this machine started the run and has ended. A later process may have its number."""
    number, _, machine = run.data.tags.get("process", "").partition(" on ")
    if machine != platform.node():
        return False
    try:
        process_start = psutil.Process(int(number)).create_time()
        return bool(process_start > run.info.start_time / 1000)  # seconds, milliseconds
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, ValueError, OverflowError):  # not a number, or the system does not reveal the time
        return False


def check_champion(client: MlflowClient) -> Finding:
    """One registered version is the champion, and its stored files match their manifest."""
    with store_errors():
        if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
            return ok("no model is registered yet")
        number = client.get_registered_model(MODEL_NAME).aliases.get(CHAMPION)
        if number is None:
            return problem(
                IntegrityError,
                f"no version of {MODEL_NAME} is the {CHAMPION}",
                "`dvc repro -fs evaluate` chooses one",
            )
        champion = client.get_model_version(MODEL_NAME, number)
        location = client.get_model_version_download_uri(MODEL_NAME, number)
    try:
        with TemporaryDirectory() as folder:
            verify(stored_folder(location, MODEL_FOLDER, Path(folder)))
    except (GptpipeError, MlflowException, OSError) as error:
        reason = f"version {number}: {first_line(error).split('; ')[0][:200]}"
        if MODEL.exists() and read_manifest(MODEL).digest == champion.tags.get(MODEL_DIGEST):
            return problem(IntegrityError, reason, "`dvc repro -fs evaluate` uploads it again")
        return problem(
            IntegrityError,
            reason,
            f"it is not the model in {MODEL}: run `gptpipe restore {champion.run_id}`, then in its folder "
            f"`MLFLOW_TRACKING_URI='{tracking_uri()}' dvc repro -fs evaluate`",
        )
    return ok(f"{MODEL_NAME} version {number}: all files match the manifest")

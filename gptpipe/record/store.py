"""The tracking store: connecting to it, and writing to one run. All its failures are raised as StoreError."""

import json
import logging
import math
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Give up within seconds if a store does not answer; the outbox keeps the operations.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # the user has not agreed to it

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from gptpipe.record.sqlite_store import (
    VIEW_TAG,
    artifacts_of,
    check_unlocked,
    create_store,
    is_moved,
    sqlite_file,
    store_lock,
    update_locations,
)
from gptpipe.shell.environment import experiment_name, tracking_uri
from gptpipe.shell.errors import IntegrityError, ResourceError, first_line

RUN_ID = re.compile("[0-9a-f]{32}")  # of MLflow; a provisional run id has the same form
RUN_FILE = "mlflow_run.json"  # in reports/: the run of the training
REPRODUCE = "reproduce"  # folder of the artifacts that `gptpipe restore` needs besides the commit
TRAINING = "training_run_id"  # tag: the provisional id of a training's run, until the store has assigned one
MAX_TAG_CHARACTERS = 5000  # MLflow's limits
MAX_PARAM_CHARACTERS = 6000

# A saved view of MLflow's runs page that shows the main metrics, because MLflow shows none by default. The view
# is in the page's menu, and a link above the runs opens it. Its format is that of MLflow 3.17; other versions
# ignore it.
_COLUMNS = (
    "metrics.`test/bits_per_byte`",
    "metrics.`val/bits_per_byte`",
    "metrics.`val/loss`",
    "tags.`changed`",
    "tags.`sweep`",
    "tags.`params_digest`",
    "tags.`environment.device`",
)
_VIEW = {"name": "Figures", "createdAt": 0, "updatedAt": 0, "state": json.dumps({"selectedColumns": _COLUMNS})}
# Make the MLflow UI show the experiment as training runs, sorted by bits per byte.
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "test/bits_per_byte",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
    VIEW_TAG: json.dumps(_VIEW),
}

for library in ("mlflow", "sqlalchemy"):  # they log tracebacks of errors that `store_errors` reports
    logging.getLogger(library).setLevel(logging.CRITICAL)

# One thing to write to a run: its kind, and content that can be stored as JSON.
Operation = tuple[str, Any]


class StoreError(ResourceError):
    """The tracking store failed. A repetition of the request may succeed."""


class RefusedError(StoreError):
    """The tracking store refuses this request, and would refuse a repetition."""


# Error codes for which a retry cannot succeed.
# RESOURCE_ALREADY_EXISTS is not one: an earlier attempt may have caused it.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn any failure of a store into a StoreError of one line, without user names and passwords."""
    try:
        yield
    except (MlflowException, OSError, sqlite3.Error, SQLAlchemyError, ValueError) as error:
        kind = RefusedError if getattr(error, "error_code", None) in _REFUSALS else StoreError
        raise kind(f"tracking store: {without_credentials(first_line(error))[:200]}") from error


def without_credentials(text: str) -> str:
    """The text with user names and passwords in addresses replaced by `***`."""
    return re.sub(r"://(?!/)\S*@", "://***@", text)  # after a third slash is a path


def connect(*, to_write: bool = False) -> MlflowClient:
    """A client of the store. Creates the store and the experiment if they do not exist. Raises StoreError.

    Several processes may connect to a fresh store at once; a lock lets one of them create it. If a SQLite store
    was moved, its locations of artifacts are updated. With `to_write`, fails within seconds if another program
    has locked a SQLite store; MLflow would wait for minutes.
    """
    uri = tracking_uri()
    with store_errors():
        file = sqlite_file(uri)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        with store_lock(file, "store"):
            if file and not file.exists():
                create_store(file)
            if file and is_moved(file):
                update_locations(file)
        if file and to_write:
            check_unlocked(file)
        with store_lock(file, "store"):
            client = MlflowClient(uri)
            if client.get_experiment_by_name(experiment_name()) is None:
                _create_experiment(client, artifacts_of(file) if file else None)
    return client


def _create_experiment(client: MlflowClient, artifacts: str | None) -> None:
    """Create the experiment with its saved view and a link to it.

    If `artifacts` is None, the server chooses their location.
    """
    number = client.create_experiment(experiment_name(), artifacts, _EXPERIMENT_TAGS)
    link = f"#/experiments/{number}/runs?viewStateShareKey=figures&workflowType=machine_learning"
    client.set_experiment_tag(number, "mlflow.note.content", f"[All runs with their figures]({link})")


def read_run_id(path: Path) -> str:
    """The run id in reports/mlflow_run.json. Raises IntegrityError."""
    run_id = _read_run_file(path).get("run_id")
    if isinstance(run_id, str) and RUN_ID.fullmatch(run_id):
        return run_id
    raise IntegrityError(f"{path}: it has no run id; `dvc repro` restores it")


def read_training_seconds(path: Path) -> float:
    """The time of the training's steps in reports/mlflow_run.json. Raises IntegrityError."""
    seconds = _read_run_file(path).get("seconds")
    if isinstance(seconds, int | float) and math.isfinite(seconds):
        return float(seconds)
    raise IntegrityError(
        f"{path}: it has no number of seconds; `dvc repro` restores it, "
        "`dvc repro -f train` makes it again if it is of an older version"
    )


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; `dvc repro` restores it") from error
    except (ValueError, RecursionError):  # not JSON
        content = None
    return content if isinstance(content, dict) else {}


def find_run(client: MlflowClient, name: str) -> str | None:
    """The id of the run that has this id. If there is none, the id of the run that has it as provisional id."""
    if not RUN_ID.fullmatch(name):
        return None
    try:
        info = client.get_run(name).info
        if info.lifecycle_stage == "active":
            return str(info.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    runs = client.search_runs([_experiment_id(client)], f"tags.{TRAINING} = '{name}'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def runs_beginning_with(client: MlflowClient, beginning: str) -> list[str]:
    """The ids of all runs whose id begins with these hexadecimal digits, of which there are four at least."""
    if not re.fullmatch("[0-9a-f]{4,31}", beginning):
        return []
    runs = client.search_runs([_experiment_id(client)], f"attributes.run_id LIKE '{beginning}%'")
    return [str(run.info.run_id) for run in runs]


def finished_runs_on(client: MlflowClient, digest: str, n_runs: int) -> list[Run]:
    """The newest finished runs that have a data set with this digest."""
    condition = f"attributes.status = 'FINISHED' AND dataset.digest = '{digest}'"
    newest_first = ["attributes.start_time DESC"]
    return list(
        client.search_runs([_experiment_id(client)], condition, max_results=n_runs, order_by=newest_first)
    )


def _experiment_id(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name(experiment_name())
    assert experiment is not None  # connect() has created it
    return str(experiment.experiment_id)


class RunWriter:
    """Writes operations to one run. The first operation, `create`, creates the run."""

    def __init__(self, name: str) -> None:
        self.name = name  # the run's id, or its provisional id
        self.run_id: str | None = None
        self._client: MlflowClient | None = None
        self._stored_steps: dict[str, set[int]] = {}  # by metric

    def write(self, operation: Operation) -> None:
        """Write an operation; a repetition changes nothing.

        Raises RefusedError, or StoreError if a retry may help.
        """
        kind, content = operation
        with store_errors():
            client = self._connect()
            if kind == "create":
                self.run_id = create_run(client, content, self.name, self.run_id)
                return
            if self.run_id is None:
                raise RefusedError(
                    f"tracking store: it has no run {self.name}; it was deleted, or never created"
                )
            match kind:
                case "metrics":
                    self._log_new_metrics(client, self.run_id, content)
                case "text":
                    name, text = content
                    client.log_text(self.run_id, text, name)
                case "tags":
                    _set_tags(client, self.run_id, content)
                case "end":
                    self._end(client, self.run_id, content)

    def _connect(self) -> MlflowClient:
        """The client. Connects at the first call, and looks for an existing run until it finds one."""
        self._client = self._client or connect(to_write=True)
        if self.run_id is None:
            run_id = find_run(self._client, self.name)
            if run_id:
                self._stored_steps = _steps_by_metric(self._client, run_id)
                self.run_id = run_id
        return self._client

    def _log_new_metrics(
        self, client: MlflowClient, run_id: str, rows: list[tuple[str, float, int, int]]
    ) -> None:
        """Log rows (name, value, milliseconds since 1970, step), except those whose step the store has."""
        new = [row for row in rows if row[3] not in self._stored_steps.get(row[0], ())]
        if new:
            client.log_batch(run_id, metrics=[Metric(*row) for row in new])
        for key, _, _, step in new:
            self._stored_steps.setdefault(key, set()).add(step)

    def _end(self, client: MlflowClient, run_id: str, status: str) -> None:
        """Set the final status.

        Delete duplicate runs, which exist if the store created a run but its answer was late.
        """
        for run in client.search_runs([_experiment_id(client)], f"tags.{TRAINING} = '{self.name}'"):
            if run.info.run_id != run_id:
                client.delete_run(run.info.run_id)
        client.set_terminated(run_id, status=status)
        update_description(client, run_id)


def _set_tags(client: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
    """Set the tags of a run. A tag whose text is empty is removed."""
    to_set = [RunTag(key, value[:MAX_TAG_CHARACTERS]) for key, value in tags.items() if value]
    if to_set:
        client.log_batch(run_id, tags=to_set)
    removed = [key for key, value in tags.items() if not value]
    for key in client.get_run(run_id).data.tags.keys() & removed if removed else ():
        client.delete_tag(run_id, key)


def _steps_by_metric(client: MlflowClient, run_id: str) -> dict[str, set[int]]:
    names = sorted(client.get_run(run_id).data.metrics)
    return {name: {metric.step for metric in client.get_metric_history(run_id, name)} for name in names}


def create_run(client: MlflowClient, description: dict[str, Any], name: str, run_id: str | None = None) -> str:
    """Create a run from the result of `describe_run`, or complete the run `run_id` of an earlier attempt.

    Returns its id. The parameters are written last: a run that has parameters is complete.
    """
    if run_id is None:
        tags = {**description["tags"], TRAINING: name}
        run = client.create_run(_experiment_id(client), tags=tags, run_name=description["name"])
        run_id = str(run.info.run_id)
    if client.get_run(run_id).data.params:
        return run_id
    inputs = [
        DatasetInput(Dataset(**data), [InputTag("mlflow.data.context", data["name"])])
        for data in description["datasets"]
    ]
    client.log_inputs(run_id, datasets=inputs)
    for path, text in description["texts"].items():
        client.log_text(run_id, text, path)
    update_description(client, run_id)
    params = [Param(key, value[:MAX_PARAM_CHARACTERS]) for key, value in description["params"].items()]
    client.log_batch(run_id, params=params)
    return run_id


def update_description(client: MlflowClient, run_id: str) -> None:
    """Write the run's description in the UI: headline metrics, red flags, and how to restore the run."""
    data = client.get_run(run_id).data
    names = [
        f"{side}/{name}"
        for side in ("test", "val")
        for name in ("bits_per_byte", "perplexity", "token_accuracy")
    ]
    rows = "".join(f"| {name} | {data.metrics[name]:.4f} |\n" for name in names if name in data.metrics)
    flags = [message for tag, message in sorted(data.tags.items()) if tag.startswith("red_flag.")]
    description = (
        f"**{data.tags.get('changed') or 'parameters as committed'}**\n\n"
        f"| metric | value |\n|---|---|\n{rows}\n"
        f"Red flags: {'; '.join(flags) or 'none'}.\n\n"
        "To restore its code, parameters and data into a folder beside this one:\n\n"
        f"    gptpipe restore {run_id}\n"
    )
    client.set_tag(run_id, "mlflow.note.content", description[:MAX_TAG_CHARACTERS])

"""The tracking store: reaching it, and writing one run to it. What it refuses is raised as StoreError."""

import hashlib
import json
import logging
import os
import platform
import re
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# A store that does not answer is given up on in seconds; what was meant for it is sent later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody was asked

import mlflow
from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from sqlalchemy.exc import SQLAlchemyError

from gptpipe.base.files import Manifest, to_json
from gptpipe.base.params import PARAMS, Section
from gptpipe.shell.console import complain
from gptpipe.shell.environment import experiment_name, git, project_root, provenance, tracking_uri
from gptpipe.shell.errors import IntegrityError, ResourceError, first_line

RUN_ID = re.compile("[0-9a-f]{32}")  # of a run, or the name that a training gives its run before the store does
_TAG_CHARACTERS, _PARAM_CHARACTERS = 5000, 6000  # MLflow's limits
_PATCH_BYTES = 1 << 20  # of changed code beside the commit; more is data, not code
_LOCKED_SECONDS = 5.0  # that a SQLite store may be locked by another program
REPRODUCE = "reproduce"  # artifacts of a run that `gptpipe restore` needs, beside the commit
TRAINING = "training_run_id"  # tag: the name that a training had for its run before the store gave it an id
# A view of the runs page with what counts, in the form of MLflow 3.17's front end, which shows no metric by itself; it
# stands in the menu of views and as a link above the runs. Others pass it over.
_COLUMNS = (
    *("metrics.`test/bits_per_byte`", "metrics.`val/bits_per_byte`", "metrics.`val/loss`"),
    *("tags.`changed`", "tags.`sweep`", "tags.`params_digest`", "tags.`environment.device`"),
)
_VIEW = {"name": "Figures", "createdAt": 0, "updatedAt": 0, "state": json.dumps({"selectedColumns": _COLUMNS})}
# What the MLflow UI shows of the experiment: training runs, sorted by what counts.
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "test/bits_per_byte",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
    "mlflow.sharedViewState.figures": json.dumps(_VIEW),
}

for library in ("mlflow", "sqlalchemy"):  # they log a traceback for what they raise, and store_errors reports that
    logging.getLogger(library).setLevel(logging.CRITICAL)

# One thing to write: its kind, and content that JSON can hold.
Operation = tuple[str, Any]


class StoreError(ResourceError):
    """The tracking store failed. The same request may succeed later."""


class RefusedError(StoreError):
    """The tracking store refuses this request, and will refuse it again."""


# Answers of MLflow that depend on the request alone. RESOURCE_ALREADY_EXISTS may come of an earlier try.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn every way in which a store can fail into a StoreError of one line, without user names and passwords."""
    try:
        yield
    except (MlflowException, OSError, sqlite3.Error, SQLAlchemyError, ValueError) as error:
        kind = RefusedError if getattr(error, "error_code", None) in _REFUSALS else StoreError
        raise kind(f"tracking store: {without_credentials(first_line(error))[:200]}") from error


def without_credentials(text: str) -> str:
    """The text without the user names and passwords of the addresses in it."""
    return re.sub(r"://\S*@", "://***@", text)


def connect(*, to_write: bool = False) -> MlflowClient:
    """A client of the store; the store and the experiment are made if they are not there. Raises StoreError.

    Several processes may come to a fresh store at once: one of them sets it up, under a lock. A SQLite store that is
    locked by another program is told `to_write` in seconds, where MLflow would wait for minutes.
    """
    uri = tracking_uri()
    is_sqlite = uri.startswith("sqlite:///")
    folder = project_root() / ".gptpipe"
    with store_errors():
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "store.lock"):
            file = Path(uri.removeprefix("sqlite:///"))
            if is_sqlite and not file.exists():
                for left_by_a_kill in file.parent.glob(f".{file.name}.*"):
                    left_by_a_kill.unlink()
                # Under another name each time: one that is made in part is refused for ever, and stays open here.
                partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
                MlflowClient(f"sqlite:///{partial}")
                with closing(sqlite3.connect(partial)) as database:  # readers, as the UI, then never block the writer
                    database.execute("PRAGMA journal_mode=WAL")
                partial.replace(file)
        if is_sqlite and to_write:
            with closing(sqlite3.connect(file, timeout=_LOCKED_SECONDS)) as database:
                database.execute("BEGIN IMMEDIATE")
        with FileLock(folder / "store.lock"):
            client = MlflowClient(uri)
            if client.get_experiment_by_name(experiment_name()) is None:
                artifacts = (project_root() / "mlartifacts").as_uri() if is_sqlite else None
                number = client.create_experiment(experiment_name(), artifacts, _EXPERIMENT_TAGS)
                link = f"#/experiments/{number}/runs?viewStateShareKey=figures&workflowType=machine_learning"
                client.set_experiment_tag(number, "mlflow.note.content", f"[All runs with their figures]({link})")
    return client


def read_run_id(path: Path) -> str:
    """The run id in reports/mlflow_run.json. Raises IntegrityError."""
    try:
        run_id = json.loads(path.read_bytes())["run_id"]
        if RUN_ID.fullmatch(run_id):
            return str(run_id)
        reason = "it has no run id"
    except OSError as error:
        reason = str(error.strerror)
    except (ValueError, KeyError, TypeError, RecursionError):  # not JSON, or of another form
        reason = "it has no run id"
    raise IntegrityError(f"{path}: {reason}; `dvc repro` restores it")


def find_run(client: MlflowClient, run_id: str) -> str | None:
    """The id of the run in the store: the same, or that of the run which a training created under this name."""
    if not RUN_ID.fullmatch(run_id):
        return None
    try:
        if (info := client.get_run(run_id).info).lifecycle_stage == "active":
            return str(info.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    found = client.search_runs([_experiment_id(client)], f"tags.{TRAINING} = '{run_id}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _experiment_id(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name(experiment_name())
    assert experiment is not None  # connect() made it
    return str(experiment.experiment_id)


class RunWriter:
    """Writes operations to one run, which the first of them, `create`, creates."""

    def __init__(self, name: str) -> None:
        self.name = name  # the run's id, or what a training calls it until it is known
        self.run_id: str | None = None
        self._client: MlflowClient | None = None
        self._known: dict[str, set[int]] = {}  # metric -> steps that the store has

    def write(self, operation: Operation) -> None:
        """Write an operation; a repetition changes nothing. Raises RefusedError, or StoreError if a retry may help."""
        kind, content = operation
        with store_errors():
            self._client = self._client or connect(to_write=True)
            if self.run_id is None and (found := find_run(self._client, self.name)):  # of an earlier process or try
                self._known, self.run_id = _steps_by_metric(self._client, found), found
            if kind == "create":
                self.run_id = create_run(self._client, content, self.name, self.run_id)
                return
            if self.run_id is None:
                raise RefusedError(f"tracking store: it has no run {self.name}; it was deleted, or never created")
            match kind:
                case "metrics":
                    new = [row for row in content if row[3] not in self._known.get(row[0], ())]
                    if new:
                        self._client.log_batch(self.run_id, metrics=[Metric(*row) for row in new])
                    for key, _, _, step in new:
                        self._known.setdefault(key, set()).add(step)
                case "text":
                    name, text = content
                    self._client.log_text(self.run_id, text, name)
                case "tags":
                    tags = [RunTag(key, value[:_TAG_CHARACTERS]) for key, value in content.items()]
                    self._client.log_batch(self.run_id, tags=tags)
                case "end":
                    for run in self._client.search_runs(
                        [_experiment_id(self._client)], f"tags.{TRAINING} = '{self.name}'"
                    ):
                        if run.info.run_id != self.run_id:  # created twice, because an answer came too late
                            self._client.delete_run(run.info.run_id)
                    self._client.set_terminated(self.run_id, status=content)
                    update_description(self._client, self.run_id)


def _steps_by_metric(client: MlflowClient, run_id: str) -> dict[str, set[int]]:
    names = sorted(client.get_run(run_id).data.metrics)
    return {name: {metric.step for metric in client.get_metric_history(run_id, name)} for name in names}


def describe_run(params: Section, lineage: Manifest, environment: dict[str, Any]) -> dict[str, Any]:
    """Content of a `create` operation: parameters, tags, data, packages and changed code of a run.

    No environment variable is part of it but DVC's names of the experiment, and no file that may hold secrets.
    """
    changed, start = _changed_params(), provenance()
    if "mlflow.source.git.commit" not in start and (project_root() / ".git").exists():
        complain("warning: git does not answer, so the run is recorded without its code; `git status` gives the reason")
    tags = {
        **start,
        **{f"environment.{key}": str(value) for key, value in environment.items()},
        "params_digest": hashlib.sha256(to_json(params.model_dump(mode="json"))).hexdigest()[:12],
        "changed": ", ".join(f"{key}={value}" for key, value in changed.items())[:_TAG_CHARACTERS],
        "process": f"{os.getpid()} on {platform.node()}",
        "mlflow.loggedArtifacts": json.dumps([{"path": "samples.json", "type": "table"}]),
    }
    if "dvc.exp_name" in start:  # runs of one sweep differ in the same parameters from the same commit
        tags["sweep"] = f"{start.get('dvc.baseline_rev', '')[:7]}: {', '.join(changed)}"[:_TAG_CHARACTERS]
    patch, left_out = changed_code()
    if left_out:
        tags["left_out_of_code.patch"] = ", ".join(left_out)[:_TAG_CHARACTERS]
    return {
        "name": os.environ.get("DVC_EXP_NAME"),
        "tags": tags,
        "params": flat(params.model_dump(mode="json")),
        "datasets": [
            {
                "name": f"split/{side}",
                "digest": lineage.files[f"{side}/tokens.npy"].sha256[:36],
                "source_type": "local",
                "source": f"data/split/{side}/tokens.npy",
                "profile": json.dumps(
                    {what: lineage.counts[f"{side}_{what}"] for what in ("documents", "tokens", "bytes")}
                ),
            }
            for side in ("train", "val", "test")
        ],
        "texts": {
            "environment.txt": "".join(sorted({f"{d.name}=={d.version}\n" for d in distributions()})),
            "lineage.json": lineage.to_bytes().decode(),
            **({f"{REPRODUCE}/code.patch": patch} if patch is not None and len(patch) <= _PATCH_BYTES else {}),
        },
    }


def changed_code() -> tuple[str | None, list[str]]:
    """What differs from git's revision, as a patch, and the files that it leaves out because they may hold secrets.

    Staged files are part of the patch. A renamed file is left out if its old or its new name looks like a secret's.
    The patch is None where git does not answer.
    """
    if (listed := git("diff", "--name-status", "-z", "-M", "HEAD", "--", ".")) is None:
        return None, []
    words = iter(listed.split("\0"))
    secrets: set[str] = set()
    for status in filter(None, words):
        names = [next(words) for _ in range(2 if status[0] in "RC" else 1)]
        if any(map(may_hold_secrets, names)):
            secrets.update(names)
    without = [f":(top,literal,exclude){name}" for name in sorted(secrets)]
    diff = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-renames", "HEAD", "--")
    return git(*diff, ".", ":!dvc.lock", ":!reports", *without), sorted(secrets)


# Names, in lower case, of files and folders that usually hold passwords, tokens or keys.
_SECRETS = (
    *(".env*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.token"),
    *(
        "id_rsa*",
        "id_dsa*",
        "id_ecdsa*",
        "id_ed25519*",
        "*credential*",
        "*password*",
        "secret*",
        "*_secret*",
        "*-secret*",
    ),
    *(".netrc", "_netrc", ".pgpass", ".my.cnf", ".htpasswd", ".npmrc", ".pypirc", "kubeconfig"),
    *(".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", "config.local"),
)


def may_hold_secrets(name: str) -> bool:
    """Whether a file's path looks like that of a secret. `.dvc/config` counts: a remote's password may be in it."""
    parts = name.lower().split("/")
    is_of_dvc = parts[-2:] == [".dvc", "config"]
    return is_of_dvc or any(fnmatchcase(part, pattern) for part in parts for pattern in _SECRETS)


def _changed_params() -> dict[str, str]:
    """Parameters that differ from those of the commit: what this run tries."""
    committed = git("show", f"HEAD:./{PARAMS}")
    if committed is None or not PARAMS.exists():
        return {}
    yaml = YAML(typ="safe", pure=True)
    try:
        before = flat(yaml.load(committed))
    except (YAMLError, AttributeError):  # params.yaml was damaged when it was committed
        return {}
    now = flat(yaml.load(PARAMS.read_bytes()))
    return {key: value for key, value in now.items() if before.get(key) != value}


def update_description(client: MlflowClient, run_id: str) -> None:
    """The run's description in the UI: headline figures, red flags, and how to come back to this run."""
    metrics, tags = (data := client.get_run(run_id).data).metrics, data.tags
    names = [f"{side}/{name}" for side in ("test", "val") for name in ("bits_per_byte", "perplexity", "token_accuracy")]
    rows = "".join(f"| {name} | {metrics[name]:.4f} |\n" for name in names if name in metrics)
    flags = [words for name, words in sorted(tags.items()) if name.startswith("red_flag.")]
    note = (
        f"**{tags.get('changed') or 'parameters as committed'}**\n\n"
        f"| figure | value |\n|---|---|\n{rows}\n"
        f"Red flags: {'; '.join(flags) or 'none'}.\n\n"
        f"Its code, parameters and data again, in a folder beside this one:\n\n    gptpipe restore {run_id}\n"
    )
    client.set_tag(run_id, "mlflow.note.content", note[:_TAG_CHARACTERS])


def create_run(client: MlflowClient, description: dict[str, Any], name: str, run_id: str | None = None) -> str:
    """Make a run from what `describe_run` gives, or what an earlier try did not get to of `run_id`; returns its id."""
    tags = {**description["tags"], TRAINING: name}
    run_id = run_id or str(
        client.create_run(_experiment_id(client), tags=tags, run_name=description["name"]).info.run_id
    )
    if client.get_run(run_id).data.params:  # the last that is written
        return run_id
    inputs = [
        DatasetInput(Dataset(**data), [InputTag("mlflow.data.context", data["name"])])
        for data in description["datasets"]
    ]
    client.log_inputs(run_id, datasets=inputs)
    for path, text in description["texts"].items():
        client.log_text(run_id, text, path)
    update_description(client, run_id)
    params = [Param(key, value[:_PARAM_CHARACTERS]) for key, value in description["params"].items()]
    client.log_batch(run_id, params=params)
    return run_id


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested sections as `section.key` -> text."""
    result: dict[str, str] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return result

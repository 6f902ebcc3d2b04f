"""The record of an evaluation: metrics in the run of the training, the model in the registry, and the champion.

An interruption at any point is safe: repeat the evaluation. Runs, logged models and versions are looked up
before they are created, and each is created in one transaction together with the tag by which it is found. A
rerun therefore ends with one FINISHED run, and with one logged model and one version for each model digest.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlflow
import mlflow.pyfunc
import pandas as pd
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature
from mlflow.tracking import MlflowClient

from gptpipe.base.manifest import read_manifest, verify
from gptpipe.base.params import Section
from gptpipe.evaluate.document_scores import FOLDER, paired_difference, read_scores, write_scores
from gptpipe.evaluate.evaluate import Evaluation
from gptpipe.evaluate.params import EvaluateParams
from gptpipe.record.description import describe_run
from gptpipe.record.outbox import send_outbox
from gptpipe.record.sqlite_store import sqlite_file, store_lock
from gptpipe.record.starting_model import MODEL_FOLDER, stored_folder
from gptpipe.record.store import (
    REPRODUCE,
    RefusedError,
    StoreError,
    connect,
    create_run,
    find_run,
    store_errors,
    update_description,
)
from gptpipe.score.metrics import VALIDATION_METRICS
from gptpipe.shell.environment import project_root, tracking_uri
from gptpipe.shell.errors import IntegrityError, first_line

MODEL_NAME = "gpt"
CHAMPION = "champion"
MODEL_DIGEST = "model_digest"  # tag of logged models and versions: the digest of the model folder's manifest
_LOGGED = "models:/"  # prefix of the source of a version that was created from a logged model
# `gptpipe restore` needs it, and it is in neither git nor DVC's cache while the stage runs.
_LOCK_FILE = Path("dvc.lock")
_PACKAGE = Path(__file__).resolve().parent.parent
_SERVED_MODEL = Path(__file__).parent / "served_model.py"
_SERVING_REQUIREMENTS = (
    "filelock",
    "mlflow",
    "numpy",
    "pandas",
    "psutil",
    "pyarrow",
    "pydantic",
    "rich",
    "ruamel.yaml",
    "safetensors",
    "tiktoken",
    "torch",
)
# Metrics that the training logged at its validations.
_OF_TRAINING = {f"val/{name}" for name in VALIDATION_METRICS}
_LOCK_SECONDS = 600.0  # maximal wait while another evaluation registers its model


def record_evaluation(
    all_params: Section,
    evaluate_params: EvaluateParams,
    evaluation: Evaluation,
    run_id: str,
    card: str,
    page: str,
    charts: dict[str, str],
    model: Path,
) -> str:
    """Log metrics, card, report and charts (title -> SVG) to the run of the training, and register `model`.

    Returns a line that says which version is the champion. Metrics are logged at the model's step, so that they
    lie on the curves of the training. If the store does not know the run (in a fresh clone), a new run is
    created and tagged with the old id. If the store fails, the returned line says so; the reports are on disk
    anyway.
    """
    try:
        with store_errors():
            send_outbox()
            client = connect(to_write=True)
            store = sqlite_file(tracking_uri())
            with store_lock(store, "registry", _LOCK_SECONDS):  # two evaluations must not both create a version
                run = _finished_run(client, all_params, evaluation, run_id)
                _log_evaluation(client, run.info.run_id, evaluation, card, page, charts)
                number = _ensure_version(client, run, model, evaluate_params, evaluation.documents)
                client.update_model_version(MODEL_NAME, number, description=card)
                return _choose_champion(client, number, evaluation)
    except RefusedError as error:
        return (
            f"warning: not recorded ({error}); the store refused it; "
            "check the store's version and what was deleted in it, then repeat `dvc repro -fs evaluate`"
        )
    except StoreError as error:
        return (
            f"warning: not recorded ({error}); when the store answers, repeat it with `dvc repro -fs evaluate`"
        )


def _finished_run(client: MlflowClient, all_params: Section, evaluation: Evaluation, name: str) -> Run:
    """The run of the training, or a new run in its place. Its status becomes FINISHED: the training is over."""
    run_id = find_run(client, name)
    if run_id is None or not client.get_run(run_id).data.params:  # `create_run` writes the parameters last
        description = describe_run(all_params, evaluation.split, {}, evaluation.n_parameters)
        run_id = create_run(client, description, name, run_id)
    run = client.get_run(run_id)
    if run.info.status != "FINISHED":
        client.set_terminated(run_id)
    return run


def _log_evaluation(
    client: MlflowClient, run_id: str, evaluation: Evaluation, card: str, page: str, charts: dict[str, str]
) -> None:
    """Log the metrics and all pages of an evaluation to a run, and update the run's description."""
    _log_new_metrics(client, run_id, evaluation.step, evaluation.metrics())
    texts = {"samples.md": evaluation.samples, "model_card.md": card, "report.html": page}
    for title, svg in charts.items():
        texts[f"figures/{title.lower().replace(' ', '_')}.svg"] = svg
    if _LOCK_FILE.exists():
        texts[f"{REPRODUCE}/{_LOCK_FILE}"] = _LOCK_FILE.read_bytes().decode(errors="replace")
    for name, text in texts.items():
        client.log_text(run_id, text, name)
    update_description(client, run_id)


def _log_new_metrics(client: MlflowClient, run_id: str, step: int, metrics: dict[str, float]) -> None:
    """Log metrics at a step, except those that an earlier evaluation logged there with the same value.

    A validation metric of the training stays as it is: it is of the same tokens and the same weights, and a
    second value, which another device rounds differently, would be a second point on its curve.
    """
    now = time.time_ns() // 1_000_000
    new = []
    for key, value in metrics.items():
        logged = [metric.value for metric in client.get_metric_history(run_id, key) if metric.step == step]
        if key in _OF_TRAINING and logged:
            continue
        if not any(math.isclose(value, other, rel_tol=1e-6) for other in logged):
            new.append(Metric(key, value, now, step))
    client.log_batch(run_id, metrics=new)


def _ensure_version(
    client: MlflowClient, run: Run, model: Path, evaluate_params: EvaluateParams, documents: pd.DataFrame
) -> str:
    """The number of the version of this model. Creates the version and its logged model, unless they exist.

    An unfinished or damaged logged model is uploaded again under its id, so that no incomplete one remains.
    """
    digest = read_manifest(model).digest
    registered = _version_of(client, digest)
    logged = _logged_model_of(client, run, digest, registered)
    if logged is None:
        tags = {MODEL_DIGEST: digest, "mlflow.source.name": "stages.evaluate"}
        logged = client.create_logged_model(
            run.info.experiment_id, "model", run.info.run_id, tags, run.data.params
        )
    if not _is_complete(logged, digest):
        with _temporary_folder() as folder:
            _write_pyfunc(folder / "model", logged, run, model, evaluate_params)
            write_scores(folder / "model/artifacts" / FOLDER, documents, digest)
            client.log_model_artifacts(logged.model_id, str(folder / "model"))
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    uri = f"{_LOGGED}{logged.model_id}"
    if registered and registered.source != uri:  # its logged model was deleted, and its files with it
        client.delete_model_version(MODEL_NAME, registered.version)
        registered = None
    if registered is None:
        if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
            client.create_registered_model(MODEL_NAME)
        tags = {MODEL_DIGEST: digest}
        registered = client.create_model_version(
            MODEL_NAME, uri, run.info.run_id, tags, model_id=logged.model_id
        )
    return str(registered.version)


def _version_of(client: MlflowClient, digest: str) -> ModelVersion | None:
    """The registered version with a model digest, from any run."""
    query = f"name = '{MODEL_NAME}' and tags.{MODEL_DIGEST} = '{digest}'"
    versions = client.search_model_versions(query, max_results=1)
    return versions[0] if versions else None


def _logged_model_of(
    client: MlflowClient, run: Run, digest: str, registered: ModelVersion | None
) -> LoggedModel | None:
    """The logged model of a version, in any experiment, or else that of this digest in the run's experiment."""
    if registered:
        try:
            return client.get_logged_model(str(registered.source).removeprefix(_LOGGED))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    query = f"tags.{MODEL_DIGEST} = '{digest}'"
    logged_models = client.search_logged_models([run.info.experiment_id], query, max_results=1)
    return logged_models[0] if logged_models else None


def _is_complete(logged: LoggedModel, digest: str) -> bool:
    """Whether a logged model is READY and has the model folder and the scores of documents, undamaged."""
    if logged.status != LoggedModelStatus.READY:
        return False
    try:
        with _temporary_folder() as folder:
            model = verify(stored_folder(logged.artifact_location, MODEL_FOLDER, folder))
            scores = verify(stored_folder(logged.artifact_location, FOLDER, folder))
    except (IntegrityError, MlflowException, OSError):  # damaged, or missing
        return False
    return model.digest == digest == scores.made_from.get(MODEL_FOLDER)


def champion_version(client: MlflowClient) -> ModelVersion | None:
    """The registered version that is the champion."""
    if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
        return None
    number = client.get_registered_model(MODEL_NAME).aliases.get(CHAMPION)
    return None if number is None else client.get_model_version(MODEL_NAME, number)


def scores_of_version(client: MlflowClient, version: ModelVersion, folder: Path) -> pd.DataFrame:
    """The scores of documents that are stored with a version; `folder` is for temporary files.

    Raises IntegrityError, OSError, MlflowException if they are damaged or missing.
    """
    location = client.get_model_version_download_uri(MODEL_NAME, version.version)
    return read_scores(stored_folder(location, FOLDER, folder))


def document_scores_of(client: MlflowClient, run_id: str) -> pd.DataFrame | None:
    """The scores of documents that are stored with the model of a run; None if there are none, or damaged ones.

    Raises MlflowException if the store fails.
    """
    outputs = client.get_run(run_id).outputs
    if not outputs or not outputs.model_outputs:
        return None
    try:
        location = client.get_logged_model(outputs.model_outputs[-1].model_id).artifact_location
        with tempfile.TemporaryDirectory() as folder:  # `_temporary_folder` belongs to a registration
            return read_scores(stored_folder(location, FOLDER, Path(folder)))
    except (IntegrityError, OSError, MlflowException) as error:
        if isinstance(error, MlflowException) and error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _write_pyfunc(
    folder: Path, logged: LoggedModel, run: Run, model: Path, evaluate_params: EvaluateParams
) -> None:
    """Write the model in MLflow's pyfunc format. The model code is a Python file, not a pickle."""
    assert model.name == MODEL_FOLDER  # `stored_folder` looks for it under this name
    prompt = list(evaluate_params.prompts[:1]) or [""]
    example = pd.DataFrame({"prompt": prompt})
    options = {
        "max_new_tokens": evaluate_params.max_new_tokens,
        "temperature": evaluate_params.temperature,
        "top_k": evaluate_params.top_k or 0,  # 0: all tokens
        "top_p": evaluate_params.top_p,
        "seed": 0,
    }
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(_SERVED_MODEL),
        artifacts={"model": str(model)},
        code_paths=[str(_PACKAGE)],
        mlflow_model=Model(
            logged.artifact_location, run.info.run_id, model_uuid=logged.model_id, model_id=logged.model_id
        ),
        signature=infer_signature(None, pd.DataFrame({"text": prompt}), options),
        input_example=example,
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _SERVING_REQUIREMENTS],
    )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """An empty folder for temporary files; also removes those of a killed registration.

    MLflow's temporary copies of the model are written there too, so that none remain in the system's folder.
    """
    folder = project_root() / ".gptpipe" / ".registration.partial"
    before = tempfile.tempdir
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tempfile.tempdir = str(folder)
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def _choose_champion(client: MlflowClient, number: str, evaluation: Evaluation) -> str:
    """Move the alias only to a version that is better on the same test documents, beyond what chance explains.

    Returns a line for the user.
    """
    outcome = f"registered {MODEL_NAME} version {number}"
    bits_per_byte = evaluation.metrics().get("test/bits_per_byte")
    client.set_model_version_tag(MODEL_NAME, number, "test_digest", evaluation.results["test_digest"])
    if bits_per_byte is None:
        return f"{outcome}; without a test split no {CHAMPION} is chosen"
    client.set_model_version_tag(MODEL_NAME, number, "test_bits_per_byte", repr(bits_per_byte))
    champion = champion_version(client)
    if champion is None:
        client.set_registered_model_alias(MODEL_NAME, CHAMPION, number)
        return f"{outcome}, the first {CHAMPION}"
    if str(champion.version) == number:
        return f"{outcome}, which is the {CHAMPION} already: {bits_per_byte:.4f} bits per byte on test"
    best = float(champion.tags.get("test_bits_per_byte", "inf"))
    stays = f"{outcome}; the {CHAMPION}, version {champion.version}, stays"
    try:
        with _temporary_folder() as folder:
            of_champion = scores_of_version(client, champion, folder)
    except (IntegrityError, OSError, MlflowException) as error:
        reason = first_line(error).split("; ")[0]
        return (
            f"{stays}: its scores cannot be read ({reason}); "
            "evaluate it again, or move the alias in `mlflow ui`"
        )
    difference = paired_difference(evaluation.documents, of_champion, "test")
    if difference is None:
        return f"{stays}: it was tested on other documents"
    if not difference.is_lower:
        needed = "a new champion must be lower by more than two standard errors"
        return f"{stays} with {best:.4f} bits per byte on test; the difference is {difference}; {needed}"
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, number)
    change = f"{bits_per_byte:.4f} bits per byte on test, {best:.4f} before"
    return (
        f"{outcome}, the new {CHAMPION}: {change}; "
        f"the difference is {difference}, more than two standard errors"
    )

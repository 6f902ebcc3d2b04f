"""What evaluation records: metrics in the training's run, the model in the registry, and the champion.

Everything here may be interrupted anywhere and repeated. Runs, logged models and versions are looked up before they
are created, and each is created in one transaction together with the tag by which it is found. So a rerun ends with one
FINISHED run, and with one logged model and one version for each model digest.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
import mlflow.pyfunc
import pandas as pd
from filelock import FileLock
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature
from mlflow.tracking import MlflowClient

from gptpipe.base.manifest import read_manifest, verify
from gptpipe.base.params import Section
from gptpipe.evaluate.evaluate import Evaluation
from gptpipe.evaluate.params import EvaluateParams
from gptpipe.record.run import send_outbox
from gptpipe.record.store import (
    REPRODUCE,
    StoreError,
    connect,
    create_run,
    describe_run,
    find_run,
    store_errors,
    write_note,
)
from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import IntegrityError

MODEL_NAME = "gpt"
CHAMPION = "champion"
MODEL_DIGEST = "model_digest"  # tag of logged models and versions: the digest of the model folder's manifest
_LOGGED = "models:/"  # begins the source of a version that was made from a logged model
_KEPT = ("dvc.lock", "reports/train.json", "reports/mlflow_run.json")  # in neither git nor DVC's cache at this point
_PACKAGE = Path(__file__).resolve().parent.parent
_SERVED_MODEL = Path(__file__).parent / "served_model.py"
_SERVING_REQUIREMENTS = (
    *("filelock", "mlflow", "numpy", "pandas", "psutil", "pyarrow", "pydantic"),
    *("rich", "ruamel.yaml", "safetensors", "tiktoken", "torch"),
)
_LOCK_SECONDS = 600.0  # to wait while another evaluation registers its model


def record_evaluation(
    params: Section,
    section: EvaluateParams,
    found: Evaluation,
    run_id: str,
    page: str,
    figures: dict[str, str],
    model: Path,
) -> str:
    """Log the metrics, the report and the figures (title -> SVG) to the training's run and register `model`.

    Returns one line that says which version is the champion. Metrics are logged at the model's step, so they lie on the
    curves of the training. If the store does not know the run (in a fresh clone), a new run is created and tagged with
    the old id. If the store fails, the returned line says so; the reports are on disk all the same.
    """
    try:
        with store_errors():
            send_outbox()
            client = connect(to_write=True)
            lock = project_root() / ".gptpipe" / "registry.lock"
            with FileLock(lock, timeout=_LOCK_SECONDS):  # two evaluations at once must not both create a version
                run = _finished_run(client, params, found, run_id)
                metrics = found.metrics()
                _log_new(client, run.info.run_id, found.step, metrics)
                texts = {"samples.md": found.samples, "model_card.md": found.card, "report.html": page}
                texts |= {f"figures/{title.lower().replace(' ', '_')}.svg": svg for title, svg in figures.items()}
                texts |= {
                    f"{REPRODUCE}/{p}": p.read_bytes().decode(errors="replace") for p in map(Path, _KEPT) if p.exists()
                }
                for name, text in texts.items():
                    client.log_text(run.info.run_id, text, name)
                write_note(client, run.info.run_id)
                number = _register(client, run, model, section)
                client.update_model_version(MODEL_NAME, number, description=found.card)
                bits_per_byte = metrics.get("test/bits_per_byte")
                return _choose_champion(client, number, bits_per_byte, found.results["test_digest"])
    except StoreError as error:
        return f"warning: not recorded ({error}); repeat it with `dvc repro -fs evaluate` when the store answers"


def _finished_run(client: MlflowClient, params: Section, found: Evaluation, name: str) -> Run:
    """The run of the training, or one that takes its place. A training is over when its model is evaluated."""
    run_id = find_run(client, name)
    if run_id is None or not client.get_run(run_id).data.params:  # parameters are the last that `create_run` writes
        run_id = create_run(client, describe_run(params, found.lineage, {}), name, run_id)
    run = client.get_run(run_id)
    if run.info.status != "FINISHED":
        client.set_terminated(run_id)
    return run


def _log_new(client: MlflowClient, run_id: str, step: int, metrics: dict[str, float]) -> None:
    """Log metrics at a step, except those already there with the same value, as training's own validation is."""
    now = time.time_ns() // 1_000_000
    new = []
    for key, value in metrics.items():
        there = (metric.value for metric in client.get_metric_history(run_id, key) if metric.step == step)
        if not any(math.isclose(value, other, rel_tol=1e-6) for other in there):
            new.append(Metric(key, value, now, step))
    client.log_batch(run_id, metrics=new)


def _register(client: MlflowClient, run: Run, model: Path, params: EvaluateParams) -> str:
    """The version that holds this model. Creates it and its logged model, or completes what is there.

    A logged model that is unfinished or damaged is uploaded again under its id, so nothing half-written stays behind.
    """
    digest = read_manifest(model).digest
    existing = _version_of(client, digest)
    logged = _logged_model_of(client, run, digest, existing)
    if logged is None:
        tags = {MODEL_DIGEST: digest, "mlflow.source.name": "stages.evaluate"}
        logged = client.create_logged_model(run.info.experiment_id, "model", run.info.run_id, tags, run.data.params)
    with _temporary_files() as folder:
        if logged.status != LoggedModelStatus.READY or not _is_whole(logged, digest, folder / "stored"):
            _save(folder / "model", logged, run, model, params)
            client.log_model_artifacts(logged.model_id, str(folder / "model"))
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    uri = f"{_LOGGED}{logged.model_id}"
    if existing and existing.source != uri:  # its logged model was deleted, and the files with it
        client.delete_model_version(MODEL_NAME, existing.version)
        existing = None
    if existing is None:
        if not client.search_registered_models(f"name = '{MODEL_NAME}'"):
            client.create_registered_model(MODEL_NAME)
        tags = {MODEL_DIGEST: digest}
        existing = client.create_model_version(MODEL_NAME, uri, run.info.run_id, tags, model_id=logged.model_id)
    return str(existing.version)


def _version_of(client: MlflowClient, digest: str) -> ModelVersion | None:
    """The registered version of a model digest, in whatever run it was made."""
    found = client.search_model_versions(f"name = '{MODEL_NAME}' and tags.{MODEL_DIGEST} = '{digest}'", max_results=1)
    return found[0] if found else None


def _logged_model_of(client: MlflowClient, run: Run, digest: str, existing: ModelVersion | None) -> LoggedModel | None:
    """The logged model of a version, which may be in another experiment, or of this digest in the run's experiment."""
    if existing:
        try:
            return client.get_logged_model(str(existing.source).removeprefix(_LOGGED))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    found = client.search_logged_models([run.info.experiment_id], f"tags.{MODEL_DIGEST} = '{digest}'", max_results=1)
    return found[0] if found else None


def _is_whole(logged: LoggedModel, digest: str, folder: Path) -> bool:
    """Whether a logged model has every file of the model folder, each as its manifest says."""
    try:
        return verify(stored_model(logged.artifact_location, folder)).digest == digest
    except (IntegrityError, MlflowException, OSError):  # damaged, or missing
        return False


def stored_model(location: str, folder: Path) -> Path:
    """The model folder below an artifact location: in place if it is on this machine, else downloaded to `folder`."""
    parts = urlsplit(location)
    if parts.scheme in ("", "file"):
        return Path(url2pathname(parts.path), "artifacts", "gpt")
    return Path(mlflow.artifacts.download_artifacts(f"{location}/artifacts/gpt", dst_path=str(folder)))


def _save(folder: Path, logged: LoggedModel, run: Run, model: Path, params: EvaluateParams) -> None:
    """Write the model folder as a pyfunc whose code is a plain file."""
    prompt = list(params.prompts[:1]) or [""]
    example = pd.DataFrame({"prompt": prompt})
    options = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k or 0,  # 0: all tokens
        "top_p": params.top_p,
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
        signature=infer_signature(example, pd.DataFrame({"text": prompt}), options),
        input_example=example,
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _SERVING_REQUIREMENTS],
    )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


@contextmanager
def _temporary_files() -> Iterator[Path]:
    """A folder for this registration's temporary files; removes what a killed registration left there.

    MLflow's own temporary copies of the model go there too, so a kill leaves none in the system's folder.
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


def _choose_champion(client: MlflowClient, number: str, bits_per_byte: float | None, test_digest: str) -> str:
    """Move the alias only to a version that is better on the same test documents; returns a sentence about it."""
    name = f"registered {MODEL_NAME} version {number}"
    client.set_model_version_tag(MODEL_NAME, number, "test_digest", test_digest)
    if bits_per_byte is None:
        return f"{name}; without a test split no {CHAMPION} is chosen"
    client.set_model_version_tag(MODEL_NAME, number, "test_bits_per_byte", repr(bits_per_byte))
    champion = client.get_registered_model(MODEL_NAME).aliases.get(CHAMPION)
    if champion is None:
        client.set_registered_model_alias(MODEL_NAME, CHAMPION, number)
        return f"{name}, the first {CHAMPION}"
    if str(champion) == number:
        return f"{name}, which is the {CHAMPION} already: {bits_per_byte:.4f} bits per byte on test"
    tags = client.get_model_version(MODEL_NAME, champion).tags
    if tags.get("test_digest") != test_digest:
        return f"{name}; the {CHAMPION}, version {champion}, was tested on other documents and stays"
    best = float(tags.get("test_bits_per_byte", "inf"))
    if bits_per_byte >= best:
        return f"{name}; the {CHAMPION}, version {champion}, stays with {best:.4f} bits per byte on test"
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, number)
    return f"{name}, the new {CHAMPION}: {bits_per_byte:.4f} bits per byte on test, before it {best:.4f}"

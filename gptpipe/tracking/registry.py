"""What evaluation leaves in the record: figures in the training's run, the model in the registry, and the champion."""

import math
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import mlflow
import mlflow.pyfunc
import pandas as pd
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.tracking import MlflowClient

from gptpipe.config import EvaluateParams, Params
from gptpipe.evaluation.evaluate import Evaluation
from gptpipe.tracking.record import send_outbox
from gptpipe.tracking.store import (
    REPRODUCE,
    StoreError,
    connect,
    create_run,
    describe_run,
    find_run,
    store_errors,
    write_note,
)

MODEL_NAME = "gpt"
CHAMPION = "champion"
_KEPT = ("dvc.lock", "reports/train.json", "reports/mlflow_run.json")  # what neither git nor DVC's cache has by now
_PACKAGE = Path(__file__).resolve().parent.parent
_SERVED_MODEL = Path(__file__).parent / "served_model.py"
_SERVING_REQUIREMENTS = (
    *("filelock", "mlflow", "numpy", "pandas", "psutil", "pyarrow", "pydantic"),
    *("rich", "ruamel.yaml", "safetensors", "tiktoken", "torch"),
)


def record_evaluation(
    params: Params, found: Evaluation, run_id: str, page: str, figures: dict[str, str], model: Path
) -> str:
    """Log what was found, the report and figures (title -> SVG) into the training's run, register `model`, and say who
    is champion.

    Metrics stand at the model's step, so that the figures of its validation fall on the curves of training. Where the
    store does not know the run (a fresh clone), a new one is made and tagged with the old id. A store that fails is
    said in the line that is returned: the figures are on disk all the same.
    """
    try:
        with store_errors():
            send_outbox()
            client = connect(to_write=True)
            run = find_run(client, run_id)
            if run is None:
                run = create_run(client, describe_run(params, found.lineage, {}), run_id)
                client.set_terminated(run)
            metrics = found.metrics()
            _log_new(client, run, found.step, metrics)
            texts = {"samples.md": found.samples, "model_card.md": found.card, "report.html": page}
            texts |= {f"figures/{title.lower().replace(' ', '_')}.svg": svg for title, svg in figures.items()}
            texts |= {f"{REPRODUCE}/{p}": p.read_text("utf-8") for p in map(Path, _KEPT) if p.exists()}
            for name, text in texts.items():
                client.log_text(run, text, name)
            write_note(client, run)
            number = _register(client, run, model, params.evaluate)
            client.update_model_version(MODEL_NAME, number, description=found.card)
            return _choose_champion(client, number, metrics.get("test/bits_per_byte"), found.results["test_digest"])
    except StoreError as error:
        return f"warning: not recorded, the tracking store does not answer ({error}); later: `dvc repro -fs evaluate`"


def _log_new(client: MlflowClient, run_id: str, step: int, metrics: dict[str, float]) -> None:
    """Log metrics at a step, but for those that stand there with the same value, as training's own validation does."""
    now = time.time_ns() // 1_000_000
    new = []
    for key, value in metrics.items():
        there = (metric.value for metric in client.get_metric_history(run_id, key) if metric.step == step)
        if not any(math.isclose(value, other, rel_tol=1e-6) for other in there):
            new.append(Metric(key, value, now, step))
    client.log_batch(run_id, metrics=new)


def _register(client: MlflowClient, run_id: str, model: Path, params: EvaluateParams) -> str:
    """Log the model folder as a pyfunc whose code is a plain file, and register it; returns its version."""
    status = client.get_run(run_id).info.status
    prompt = list(params.prompts[:1]) or [""]
    options = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k or 0,  # 0: all tokens
        "top_p": params.top_p,
        "seed": 0,
    }
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(_SERVED_MODEL),
            artifacts={"model": str(model)},
            code_paths=[str(_PACKAGE)],
            signature=infer_signature(pd.DataFrame({"prompt": prompt}), pd.DataFrame({"text": prompt}), options),
            input_example=pd.DataFrame({"prompt": prompt}),
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _SERVING_REQUIREMENTS],
        )
    client.set_terminated(run_id, status=status)  # as it was: leaving the block ends the run as finished
    with suppress(MlflowException):  # it is there already
        client.create_registered_model(MODEL_NAME)
    created = client.create_model_version(MODEL_NAME, logged.model_uri, run_id, model_id=logged.model_id)
    return str(created.version)


def _choose_champion(client: MlflowClient, number: str, bits_per_byte: float | None, test_digest: str) -> str:
    """Move the alias only to a version that is better on the same test documents; says in words what was done."""
    name = f"registered {MODEL_NAME} version {number}"
    client.set_model_version_tag(MODEL_NAME, number, "test_digest", test_digest)
    if bits_per_byte is None:
        return f"{name}; without a test split no {CHAMPION} is chosen"
    client.set_model_version_tag(MODEL_NAME, number, "test_bits_per_byte", repr(bits_per_byte))
    try:
        champion = client.get_model_version_by_alias(MODEL_NAME, CHAMPION)
    except MlflowException:
        client.set_registered_model_alias(MODEL_NAME, CHAMPION, number)
        return f"{name}, the first {CHAMPION}"
    if champion.tags.get("test_digest") != test_digest:
        return f"{name}; the {CHAMPION}, version {champion.version}, was tested on other documents and stays"
    best = float(champion.tags["test_bits_per_byte"])
    if bits_per_byte >= best:
        return f"{name}; the {CHAMPION}, version {champion.version}, stays with {best:.4f} bits per byte on test"
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, number)
    return f"{name}, the new {CHAMPION}: {bits_per_byte:.4f} bits per byte on test, before it {best:.4f}"

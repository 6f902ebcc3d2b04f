"""What a finished training leaves: the model folder with its card, the curves and a summary."""

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from gptpipe.base.files import to_json, write_bytes, write_json
from gptpipe.base.manifest import Manifest, new_folder, verify
from gptpipe.base.pages import render_markdown
from gptpipe.formats.hf_tokenizer import save_tokenizer_json
from gptpipe.model.hf_weights import save_model
from gptpipe.score.metrics import VALIDATION_METRICS, Metrics
from gptpipe.score.scoring import scoring_in_words
from gptpipe.shell.errors import one_line
from gptpipe.train.checkpoint import Checkpoints, kept_in, read_state
from gptpipe.train.inputs import Inputs
from gptpipe.train.params import RunParams
from gptpipe.train.red_flags import final_red_flags
from gptpipe.train.state import Sample, TrainState


def write_model(
    target: Path,
    params: RunParams,
    inputs: Inputs,
    checkpoints: Checkpoints,
    summary: dict[str, Any],
    reports: dict[str, str],
) -> None:
    """The best model so far in Hugging Face layout, whole or not at all.

    Its manifest also names the `reports` of the training with their SHA-256, so that evaluate can trust them.
    """
    tokenizer, split = inputs.tokenizer, inputs.split
    assert checkpoints.settings is not None  # the session has set them
    start = {f"init_from/{name}": digest for name, digest in checkpoints.settings.initial_weights.items()}
    ancestors = {**split.lineage("split"), **start, **checkpoints.ancestors}
    with new_folder(target, ancestors) as folder:
        weights = checkpoints.load_best(summary["best_step"])
        save_model(folder.path, params.model, tokenizer.vocab_size, tokenizer.end_of_text, weights)
        tokenizer.save(folder.path)
        save_tokenizer_json(folder.path, tokenizer, params.model.context_length)
        write_bytes(folder.path / "README.md", _card(params, summary, ancestors).encode())
        folder.counts = {name: summary[name] for name in ("best_step", "steps", "tokens", "parameters")}
        folder.counts["scoring"] = summary["scoring"]
        folder.counts["reports"] = reports


def write_state(target: Path, params: RunParams, split: Manifest, checkpoints: Checkpoints) -> None:
    """The kept state in a checkpoint folder's layout, with the best model of its time; empty if none is kept.

    There are two copies: an output of DVC, which DVC removes before the stage runs again, and one outside DVC,
    from which a longer training continues.
    """
    with new_folder(target, {**split.lineage("split"), **checkpoints.ancestors}) as folder:
        for kept in kept_in(checkpoints.folder)[-1:] if params.train.keep_state else ():
            verify(kept)
            content = read_state(kept)
            assert content.best_step is not None  # a training validates before its first step
            best = checkpoints.best_folder(content.best_step)
            for path in sorted(path for part in (kept, best) for path in part.rglob("*") if path.is_file()):
                write_bytes(folder.path / path.relative_to(checkpoints.folder), path.read_bytes())
            folder.counts = {"step": content.step, "run_id": content.run_id}


def _card(params: RunParams, summary: dict[str, Any], ancestors: dict[str, str]) -> str:
    """The model card: what training knows before the evaluation, under the header that model hubs read."""
    origin = (
        "from scratch" if params.train.init_from is None else f"from the weights in {params.train.init_from}"
    )
    listed = [(one_line(name), digest) for name, digest in sorted(ancestors.items())]
    values = {
        "val": summary["val"],
        "summary": summary,
        "origin": origin,
        "ancestors": listed,
        "scoring": scoring_in_words(summary["scoring"]),
    }
    return render_markdown(Path(__file__).with_name("card.jinja"), **dict(params), **values)


def samples_table(samples: list[Sample]) -> bytes:
    """The samples of a training as the JSON that MLflow shows as a table."""
    return to_json({"columns": ["step", "prompt", "continuation"], "data": samples})


def write_reports(reports: Path, state: TrainState, summary: dict[str, Any]) -> dict[str, str]:
    """Write summary, samples, and the curves of steps and validations; returns their names and SHA-256."""
    contents = {
        "train.json": to_json(summary),
        "train.samples.json": samples_table(state.samples),
        "train.steps.csv": _step_curves(state).to_csv(index=False).encode(),
        "train.validations.csv": _validation_curves(state).to_csv(index=False).encode(),
    }
    for name, content in contents.items():
        write_bytes(reports / name, content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def write_run(reports: Path, run_id: str | None, params: RunParams, state: TrainState) -> None:
    """Write mlflow_run.json: what differs between two trainings that are otherwise equal, its run and its time.

    `seconds` is the time of all steps, also of those before an interruption. Validations and checkpoints are
    not counted, nor is a step whose time is unknown.
    """
    tokens_per_step = params.train.batch_size * params.model.context_length
    speeds = [metrics.get("train/tokens_per_second") for _, _, metrics in state.journal]
    seconds = sum(tokens_per_step / speed for speed in speeds if speed)
    write_json(reports / "mlflow_run.json", {"run_id": run_id, "seconds": seconds})


def summarise(params: RunParams, inputs: Inputs, state: TrainState, checkpoints: Checkpoints) -> dict[str, Any]:
    """The content of reports/train.json, with the places where environment or settings changed."""
    best = state.best
    assert best is not None  # the loop validates at step 0
    metrics = next(metrics for step, metrics in _validation_metrics(state) if step == best.step)
    summary = {
        "best_step": best.step,
        "steps": state.step,
        "tokens": state.step * params.train.batch_size * params.model.context_length,
        "parameters": state.model.n_parameters(),
        "val": {name.removeprefix("val/"): value for name, value in metrics.items()},
        "scoring": inputs.scoring.describe(),
        "red_flags": final_red_flags(state.history, inputs.n_steps),
    }
    if checkpoints.inexact:
        summary["resumed_inexactly"] = checkpoints.inexact
    if checkpoints.changes:
        summary["changed_settings"] = checkpoints.changes
    return summary


def _validation_metrics(state: TrainState) -> list[tuple[int, Metrics]]:
    """The step and the metrics of each validation, from the journal."""
    return [(step, metrics) for step, _, metrics in state.journal if "val/loss" in metrics]


def _step_curves(state: TrainState) -> pd.DataFrame:
    """Loss, gradient norm and learning rate of each step."""
    names = ("loss", "grad_norm", "lr")
    rows = [
        (step, *(metrics[f"train/{name}"] for name in names))
        for step, _, metrics in state.journal
        if "train/loss" in metrics
    ]
    return pd.DataFrame(rows, columns=["step", *names])


def _validation_curves(state: TrainState) -> pd.DataFrame:
    """Each validation, with the mean training loss since the previous one."""
    rows = [
        (validation.step, validation.train_loss, *(metrics[f"val/{name}"] for name in VALIDATION_METRICS))
        for validation, (_, metrics) in zip(state.history, _validation_metrics(state), strict=True)
    ]
    return pd.DataFrame(rows, columns=["step", "train_loss", "val_loss", *VALIDATION_METRICS[1:]])

"""The range of the validation losses of earlier runs on the same data: whether a run's curve is normal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mlflow.tracking import MlflowClient

from gptpipe.base.manifest import Manifest
from gptpipe.base.params import Section
from gptpipe.evaluate.charts import Line
from gptpipe.record.description import dataset_digest
from gptpipe.record.store import StoreError, connect, finished_runs_on, store_errors

_MAX_RUNS = 30  # the newest


@dataclass(frozen=True)
class Comparable:
    """What the report says about comparable runs: a sentence, and the range to draw."""

    sentence: str
    steps: Sequence[float] = ()
    lowest: Sequence[float] = ()  # validation loss of any of them at these steps, in nats per token
    highest: Sequence[float] = ()


def comparable_runs(params: Section, split: Manifest, run_id: str, validations: Line) -> Comparable:
    """The range of finished runs with the same training tokens and as many tokens per step.

    `validations` is the curve of the run itself. If the store fails, the sentence says so.
    """
    try:
        with store_errors():
            curves = _curves(connect(), params, split, run_id)
    except StoreError as error:
        return Comparable(f"Not compared with other runs: {error}")
    return range_of(curves, validations)


def _curves(client: MlflowClient, params: Section, split: Manifest, run_id: str) -> list[Line]:
    """The validation losses of the newest comparable runs, over steps."""
    values = params.model_dump()
    same = {
        "train.batch_size": str(values["train"]["batch_size"]),
        "model.context_length": str(values["model"]["context_length"]),
    }
    curves: list[Line] = []
    for run in finished_runs_on(client, dataset_digest(split, "train"), _MAX_RUNS):
        is_same = all(run.data.params.get(key) == value for key, value in same.items())
        if run.info.run_id == run_id or not is_same:
            continue
        history = client.get_metric_history(run.info.run_id, "val/loss")
        points = sorted((point.step, point.value) for point in history if math.isfinite(point.value))
        if points:
            curves.append(([step for step, _ in points], [loss for _, loss in points]))
    return curves


def range_of(curves: Sequence[Line], validations: Line) -> Comparable:
    """The range of `curves` at the steps of `validations`, between which they are interpolated.

    A step that fewer than two of them reach is left out.
    """
    if len(curves) < 2:
        n_others = "no other finished run" if not curves else "only one other finished run"
        return Comparable(f"The store has {n_others} on this training text with as many tokens per step.")
    steps, lowest, highest, place = [], [], [], ""
    for step, loss in zip(*validations, strict=True):
        losses = [float(np.interp(step, xs, ys)) for xs, ys in curves if xs[0] <= step <= xs[-1]]
        if len(losses) < 2:
            continue
        steps.append(step)
        lowest.append(min(losses))
        highest.append(max(losses))
        place = "above" if loss > highest[-1] else "below" if loss < lowest[-1] else "within"
    sentence = f"{len(curves)} other finished runs have the same training text and as many tokens per step"
    if not steps:
        return Comparable(f"{sentence}, but fewer than two of them are as long as this one.")
    return Comparable(
        f"{sentence}. The chart of the loss shows the range of their validation losses. At step {steps[-1]:,}, "
        f"this run is {place} the range of {lowest[-1]:.3f} to {highest[-1]:.3f}.",
        steps,
        lowest,
        highest,
    )

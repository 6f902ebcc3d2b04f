"""`gptpipe compare`: runs in groups of equal parameters, apart from the seed."""

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlflow
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import norm, sem, t, ttest_ind

from gptpipe.base.files import write_bytes
from gptpipe.evaluate.charts import thinned
from gptpipe.evaluate.document_scores import paired_difference
from gptpipe.evaluate.registry import document_scores_of
from gptpipe.record.store import connect, store_errors
from gptpipe.shell.environment import experiment_name
from gptpipe.shell.errors import ConfigError, InputError

_CURVES = ("train/loss", "val/loss")  # rows of the figure
_X_AXES = ("step", "tokens", "minutes")  # its columns
# Endings of metrics' names.
_HIGHER_IS_BETTER = ("accuracy", "acc", "acc_norm", "exact_match", "bleu", "rouge_l")
_MAX_RUNS = 50_000  # MLflow's limit


def compare(names: Sequence[str], metric: str, curves: Path | None = None) -> str:
    """A table with one row per group, best first: mean of `metric`, standard error, difference to the best.

    Of runs with equal parameters and equal seed only the newest counts, because a repetition is no new
    evidence. The standard error of a single seed is that over documents. The table says whether the difference
    pairs seeds, documents or nothing. `names` select runs: the beginning of an id, the name of a run or an
    experiment, or a sweep. Draws the losses of the groups into the file `curves`. Raises ConfigError,
    InputError, StoreError.
    """
    if curves and curves.suffix not in (".html", ".svg", ".png"):
        raise ConfigError(f"compare: cannot draw into {curves}; name a .html, .svg or .png file")
    runs = _select_runs(names, metric)
    labels = _label_groups(runs)
    table = _statistics(runs, labels, metric)
    text = str(table.to_string(na_rep="", float_format=" {:.4f}".format))
    if curves:
        groups = {label: runs[labels == label] for label in table.index}
        write_bytes(curves, _render(_draw(groups), curves.suffix, metric, text))
    return text


def _select_runs(names: Sequence[str], metric: str) -> pd.DataFrame:
    """The newest run of each set of parameters, of those with the metric and one of the names.

    Without names, any name will do.
    """
    with store_errors():
        connect()
        # MLflow returns the newest run first.
        all_runs = mlflow.search_runs(experiment_names=[experiment_name()], max_results=_MAX_RUNS)
    name_columns = ["run_id", "tags.mlflow.runName", "tags.dvc.exp_name", "tags.sweep"]
    run_names = all_runs.reindex(columns=name_columns).astype(str)
    has_name = run_names.isin(names).any(axis=1) | run_names["run_id"].str.startswith(tuple(names) or "")
    column = f"metrics.{metric}"
    runs = all_runs[has_name & all_runs[column].notna()] if column in all_runs else all_runs.head(0)
    if runs.empty:
        raise InputError(
            f"compare: none of {len(all_runs)} runs has {metric} and one of the names; `mlflow ui` shows both"
        )
    params_digest = runs.get("tags.params_digest", runs["run_id"])
    return runs[~params_digest.duplicated()]


def _label_groups(runs: pd.DataFrame) -> "pd.Series[str]":
    """For each run, the values of the parameters in which the runs differ, without the seed."""
    params = runs.filter(regex=r"^params\.(?!seed$)")
    params.columns = [name.removeprefix("params.") for name in params.columns]
    differing = params.loc[:, params.nunique() > 1].to_dict("records")
    labels = [", ".join(f"{name}={value}" for name, value in row.items()) for row in differing]
    return pd.Series(labels, index=runs.index)


def _statistics(runs: pd.DataFrame, labels: "pd.Series[str]", metric: str) -> pd.DataFrame:
    column = f"metrics.{metric}"
    groups = runs.groupby(labels)
    table = groups[column].agg(["count", "mean", "sem"])
    table = table.sort_values("mean", ascending=not metric.endswith(_HIGHER_IS_BETTER))
    if f"{column}_standard_error" in runs:
        table["sem"] = table["sem"].fillna(groups[f"{column}_standard_error"].first())
    best, *others = (runs[labels == label] for label in table.index)  # the best group is first
    differences = [_Difference(), *(_difference(other, best, metric) for other in others)]
    table["difference"] = [difference.value for difference in differences]
    table["error"] = [difference.standard_error for difference in differences]
    table["p"] = [difference.p for difference in differences]
    table["pairs"] = [f" {difference.pairs}" for difference in differences]
    table.insert(0, "", ["best", *[""] * len(others)])
    names = ["", "runs", metric, "standard error", "difference", "its error", "p", " paired by"]
    table.columns = pd.Index(names)
    return table


class _Difference(NamedTuple):
    """The difference of two groups, with the p value of the hypothesis that it is zero, and what was paired."""

    value: float = math.nan
    standard_error: float = math.nan
    p: float = math.nan
    pairs: str = ""


def _difference(group: pd.DataFrame, best: pd.DataFrame, metric: str) -> _Difference:
    """Pairs the runs of equal seeds if there are two such pairs, else the documents of two runs, else nothing.

    Seeds come first, because only they show the variation between trainings.
    """
    column = f"metrics.{metric}"
    pairs = _pairs_of_runs(group, best)
    if len(pairs) > 1:
        differences = (pairs[f"{column}_group"] - pairs[f"{column}_best"]).to_numpy(dtype=np.float64)
        value, error = float(differences.mean()), float(sem(differences))
        p = 2 * t.sf(abs(value) / error, len(pairs) - 1) if error else math.nan
        return _Difference(value, error, float(p), f"{len(pairs)} seeds")
    runs = (pairs["run_id_group"], pairs["run_id_best"]) if len(pairs) else (group["run_id"], best["run_id"])
    by_document = _difference_by_document(str(runs[0].iloc[0]), str(runs[1].iloc[0]), metric)
    if by_document:
        return by_document
    values, best_values = (table[column].to_numpy(dtype=np.float64) for table in (group, best))
    value = float(values.mean() - best_values.mean())
    if min(len(values), len(best_values)) < 2:
        return _Difference(value, pairs="nothing")
    welch = ttest_ind(best_values, values, equal_var=False)
    return _Difference(value, math.hypot(sem(values), sem(best_values)), float(welch.pvalue), "nothing")


def _pairs_of_runs(group: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """The runs of both groups that have equal seeds, a row for each pair."""
    if "params.seed" not in group:
        return pd.DataFrame()
    known = [runs[runs["params.seed"].notna()] for runs in (group, best)]
    return known[0].merge(known[1], on="params.seed", suffixes=("_group", "_best"))


@store_errors()
def _difference_by_document(run_id: str, best_id: str, metric: str) -> _Difference | None:
    """The difference over the documents of two runs; None if they are not the same or not stored."""
    side, _, name = metric.partition("/")
    if name != "bits_per_byte":
        return None
    client = mlflow.MlflowClient()
    tables = [document_scores_of(client, run) for run in (run_id, best_id)]
    if tables[0] is None or tables[1] is None:
        return None
    difference = paired_difference(tables[0], tables[1], side)
    if difference is None:
        return None
    value, error = difference.bits_per_byte, difference.standard_error
    p = 2 * norm.sf(abs(value) / error) if error else math.nan
    return _Difference(value, error, float(p), f"{difference.n_documents:,} documents")


def _draw(groups: dict[str, pd.DataFrame]) -> Figure:
    """Losses over steps, tokens and time: the mean of each group, and a band from lowest to highest."""
    figure = Figure((14, 4 * len(_CURVES)), layout="constrained")
    rows = figure.subplots(len(_CURVES), len(_X_AXES), sharey="row")
    for panels, metric in zip(rows, _CURVES, strict=True):
        for label, runs in groups.items():
            histories = pd.concat([_history(run, metric) for _, run in runs.iterrows()])
            by_step = histories.groupby(level=0)
            mean = by_step.mean()
            low, high = by_step["value"].min(), by_step["value"].max()
            for panel, x_axis in zip(panels, _X_AXES, strict=True):
                panel.plot(mean[x_axis], mean["value"], label=label or "all")
                panel.fill_between(mean[x_axis], low, high, alpha=0.2)
                panel.set(xlabel=x_axis, ylabel=metric)
                panel.locator_params(axis="x", nbins=4)
    figure.axes[0].legend(frameon=False)
    return figure


@store_errors()
def _history(run: "pd.Series[str]", metric: str) -> pd.DataFrame:
    """A run's values of a metric, with step, tokens and minutes, thinned for drawing."""
    points = mlflow.MlflowClient().get_metric_history(run["run_id"], metric)
    table = pd.DataFrame([(p.step, p.timestamp, p.value) for p in points], columns=["step", "minutes", "value"])
    batch_size = float(run.get("params.train.batch_size", "nan"))
    context_length = float(run.get("params.model.context_length", "nan"))
    table["tokens"] = table["step"] * batch_size * context_length
    start = pd.Timestamp(run["start_time"]).timestamp() * 1000  # milliseconds, as the timestamps
    table["minutes"] = (table["minutes"] - start) / 60_000
    table = table.sort_values("step")
    return pd.DataFrame({name: thinned(table[name].tolist()) for name in table})


def _render(figure: Figure, suffix: str, metric: str, table: str) -> bytes:
    """The figure as a PNG or SVG file, or as an HTML page with the table above it."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png" if suffix == ".png" else "svg", metadata=None)
        image = file.getvalue()
    if suffix != ".html":
        return image
    head = f'<!DOCTYPE html>\n<meta charset="utf-8"><title>{html.escape(metric)}</title>\n'
    svg = image[image.index(b"<svg") :]  # without the XML declaration
    return f"{head}<pre>{html.escape(table)}</pre>\n".encode() + svg

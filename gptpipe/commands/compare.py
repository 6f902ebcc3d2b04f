"""Runs side by side, grouped by the parameters that they differ in apart from the seed."""

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

import mlflow
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import ttest_ind

from gptpipe.base.files import write_bytes
from gptpipe.evaluate.charts import thinned
from gptpipe.record.store import connect, store_errors
from gptpipe.shell.environment import experiment_name
from gptpipe.shell.errors import ConfigError, InputError

_CURVES = ("train/loss", "val/loss")
_OVER = ("step", "tokens", "minutes")
_MORE_IS_BETTER = ("accuracy", "bleu", "rouge_l")


def compare(names: Sequence[str], metric: str, curves: Path | None = None) -> str:
    """A table: mean of `metric` over the seeds of each group, best first, standard error, Welch's p against the best.

    Of runs with equal parameters the newest counts, for repeating a seed adds no evidence. A single seed has the
    standard error over documents. `names` choose runs: an id's beginning, a run's or experiment's name, or a sweep.
    Draws the losses of the groups into `curves`. Raises ConfigError, InputError, StoreError.
    """
    if curves and curves.suffix not in (".html", ".svg", ".png"):
        raise ConfigError(f"compare: cannot draw into {curves}; end its name in .html, .svg or .png")
    with store_errors():
        connect()
        found = mlflow.search_runs(experiment_names=[experiment_name()], max_results=50_000)  # newest first
    own = found.reindex(columns=["run_id", "tags.mlflow.runName", "tags.dvc.exp_name", "tags.sweep"]).astype(str)
    named = own.isin(names).any(axis=1) | own["run_id"].str.startswith(tuple(names) or "")
    runs = found[named & found.get(f"metrics.{metric}", named).notna()]
    runs = runs[~runs.get("tags.params_digest", runs["run_id"]).duplicated()]
    if runs.empty or f"metrics.{metric}" not in found:
        raise InputError(f"compare: none of {len(found)} runs has {metric} and one of the names; see `mlflow ui`")
    params = runs.filter(regex=r"^params\.(?!seed$)").rename(columns=lambda key: str(key).removeprefix("params."))
    differing = params.loc[:, params.nunique() > 1].to_dict("records")
    changes = [", ".join(f"{key}={value}" for key, value in row.items()) for row in differing]
    labels = pd.Series(changes, index=runs.index)
    groups, values = runs.groupby(labels), runs[f"metrics.{metric}"]
    table = groups[f"metrics.{metric}"].agg(["count", "mean", "sem"])
    table = table.sort_values("mean", ascending=not metric.endswith(_MORE_IS_BETTER))
    if f"metrics.{metric}_standard_error" in runs:
        table["sem"] = table["sem"].fillna(groups[f"metrics.{metric}_standard_error"].first())
    by_label = {label: values[labels == label] for label in table.index}
    best = by_label[table.index[0]]
    table["p"] = [float(ttest_ind(best, other, equal_var=False).pvalue) if min(len(best), len(other)) > 1
                  else float("nan") for other in by_label.values()]  # fmt: skip
    table.iloc[0, -1] = float("nan")
    table.insert(0, "", ["best", *[""] * (len(table) - 1)])
    table.columns = ["", "runs", metric, "standard error", "p against best"]
    text = str(table.to_string(na_rep="", float_format="{:.4f}".format))
    if curves:
        figure = _draw({label: runs[labels == label] for label in table.index})
        with io.BytesIO() as drawn:
            figure.savefig(drawn, format="png" if curves.suffix == ".png" else "svg", metadata=None)
            content = drawn.getvalue()
        if curves.suffix == ".html":
            head = f'<!DOCTYPE html>\n<meta charset="utf-8"><title>{html.escape(metric)}</title>\n'
            content = f"{head}<pre>{html.escape(text)}</pre>\n".encode() + content[content.index(b"<svg") :]
        write_bytes(curves, content)
    return text


def _draw(groups: dict[str, pd.DataFrame]) -> Figure:
    """Losses over steps, tokens and time: the mean over a group's runs, and a band from the lowest to the highest."""
    figure = Figure((14, 4 * len(_CURVES)), layout="constrained")
    for panels, metric in zip(figure.subplots(len(_CURVES), len(_OVER), sharey="row"), _CURVES, strict=True):
        for label, runs in groups.items():
            runs_by_step = pd.concat([_history(run, metric) for _, run in runs.iterrows()]).groupby(level=0)
            mean, low, high = runs_by_step.mean(), runs_by_step["value"].min(), runs_by_step["value"].max()
            for panel, over in zip(panels, _OVER, strict=True):
                panel.plot(mean[over], mean["value"], label=label or "all")
                panel.fill_between(mean[over], low, high, alpha=0.2)
                panel.set(xlabel=over, ylabel=metric)
                panel.locator_params(axis="x", nbins=4)
    figure.axes[0].legend(frameon=False)
    return figure


@store_errors()
def _history(run: "pd.Series[str]", metric: str) -> pd.DataFrame:
    """The curve of a metric in a run, over steps, tokens and minutes, thinned for drawing."""
    points = mlflow.MlflowClient().get_metric_history(run["run_id"], metric)
    table = pd.DataFrame([(p.step, p.timestamp, p.value) for p in points], columns=["step", "minutes", "value"])
    per_step = (float(run.get(f"params.{key}", "nan")) for key in ("train.batch_size", "model.context_length"))
    table["tokens"] = table["step"] * math.prod(per_step)
    table["minutes"] = (table["minutes"] - pd.Timestamp(run["start_time"]).timestamp() * 1000) / 60_000
    table = table.sort_values("step")
    return pd.DataFrame({name: thinned(table[name].tolist()) for name in table})

"""Runs side by side, grouped by the parameters that they differ in apart from the seed."""

from collections.abc import Sequence

import mlflow
import pandas as pd
from scipy.stats import ttest_ind

from gptpipe.environment import experiment_name
from gptpipe.errors import InputError
from gptpipe.tracking.store import connect, store_errors

_MORE_IS_BETTER = ("accuracy", "bleu", "rouge_l")


def compare(names: Sequence[str], metric: str) -> str:
    """A table: mean of `metric` over the seeds of each group, best first, standard error, Welch's p against the best.

    Of runs with equal parameters the newest counts, for repeating a seed adds no evidence. A single seed has the
    standard error over documents. `names` choose runs: an id's beginning, a run's or experiment's name, or a sweep.
    Raises InputError, StoreError.
    """
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
    table["sem"] = table["sem"].fillna(groups[f"metrics.{metric}_standard_error"].first())
    by_label = {label: values[labels == label] for label in table.index}
    best = by_label[table.index[0]]
    table["p"] = [float(ttest_ind(best, other, equal_var=False).pvalue) if min(len(best), len(other)) > 1
                  else float("nan") for other in by_label.values()]  # fmt: skip
    table.iloc[0, -1] = float("nan")
    table.insert(0, "", ["best", *[""] * (len(table) - 1)])
    table.columns = ["", "runs", metric, "standard error", "p against best"]
    return str(table.to_string(na_rep="", float_format="{:.4f}".format))

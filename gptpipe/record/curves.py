"""The curves of a recorded run as a table."""

from pathlib import Path

import pandas as pd

from gptpipe.record.store import connect, find_run, read_run_id, store_errors
from gptpipe.shell.errors import InputError


def curves_of(run: str | Path) -> pd.DataFrame:
    """A row for each step, a column for each metric; NaN where a step has no value.

    `run` is a run id, or a file like reports/mlflow_run.json with one. Raises InputError, IntegrityError,
    StoreError.
    """
    name = read_run_id(run) if isinstance(run, Path) else run
    with store_errors():
        client = connect()
        run_id = find_run(client, name)
        if run_id is None:
            raise InputError(f"there is no run {name!r:.100}; `mlflow ui` shows all")
        metrics = client.get_run(run_id).data.metrics
        histories = {metric: client.get_metric_history(run_id, metric) for metric in sorted(metrics)}
    columns = {
        metric: pd.Series({point.step: point.value for point in history})
        for metric, history in histories.items()
    }
    return pd.DataFrame(columns).rename_axis("step").sort_index()

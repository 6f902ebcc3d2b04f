"""How long the training took and what its GPUs used, from its record."""

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from gptpipe.record.store import StoreError, connect, find_run, store_errors

_POWER = "_power_usage_watts"  # end of the names of MLflow's metrics of GPUs


def training_cost(name: str) -> list[str]:
    """Sentences for the model card; `name` is the id of the training's run."""
    try:
        with store_errors():
            client = connect()
            run_id = find_run(client, name)
            run = None if run_id is None else client.get_run(run_id)
            if run is None or run.info.end_time is None:
                return ["Duration and energy: not in the record."]
            return _sentences(client, run)
    except StoreError:
        return ["Duration and energy: the record does not answer."]


def _sentences(client: MlflowClient, run: Run) -> list[str]:
    hours = (run.info.end_time - run.info.start_time) / 3_600_000
    duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    watts = 0.0  # of all GPUs together
    for key in run.data.metrics:
        if key.startswith("system/gpu_") and key.endswith(_POWER):
            values = [metric.value for metric in client.get_metric_history(run.info.run_id, key)]
            watts += sum(values) / len(values)
    energy = (
        f"about {watts * hours / 1000:.3g} kWh: the mean power of the GPUs in the record, times the duration"
    )
    return [
        f"Duration: {duration} from the start to the end of the training, interruptions included.",
        f"Energy: {energy if watts else 'not measured'}.",
    ]

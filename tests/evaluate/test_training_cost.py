"""Duration and energy of a training, from its run in the tracking store."""

from pathlib import Path

import pytest
from mlflow.entities import Metric

from gptpipe.evaluate.training_cost import training_cost
from gptpipe.record.store import connect


def test_duration_and_energy_come_from_the_record(project: Path) -> None:
    client = connect(to_write=True)
    experiment = client.get_experiment_by_name("gptpipe")
    assert experiment is not None
    run = client.create_run(experiment.experiment_id, start_time=1_000_000)
    client.set_terminated(run.info.run_id, end_time=1_000_000 + 2 * 3_600_000)
    expected = "Duration: 2.0 hours from the start to the end of the training, interruptions included."
    assert training_cost(run.info.run_id) == [expected, "Energy: not measured."]
    powers = [("0", 200), ("0", 400), ("1", 700)]
    metrics = [
        Metric(f"system/gpu_{gpu}_power_usage_watts", watts, 1, step)
        for step, (gpu, watts) in enumerate(powers)
    ]
    client.log_batch(run.info.run_id, metrics=metrics)
    # GPU 0 uses 300 watts on average and GPU 1 700, for two hours.
    assert training_cost(run.info.run_id)[1].startswith("Energy: about 2 kWh: the mean power of the GPUs")


def test_a_run_that_the_record_does_not_know_has_no_duration(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert training_cost("0" * 32) == ["Duration and energy: not in the record."]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/none/mlflow.db")
    assert training_cost("0" * 32) == ["Duration and energy: the record does not answer."]

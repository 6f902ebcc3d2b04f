"""What the type checker does not see of benchmarks: what they run, and the arithmetic of their tables."""

import importlib
import os
from pathlib import Path

import pytest
import tiny

import benchmarks
from benchmarks import shared_machine
from benchmarks.overheads import seconds_to_first_validation


def test_benchmarks_limit_busy_waiting_as_commands_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    importlib.reload(benchmarks)
    assert os.environ["GOMP_SPINCOUNT"] == "4000"


def test_the_training_that_measures_start_up_leaves_the_project_alone(
    toy_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert 0 < seconds_to_first_validation(tiny.params(), toy_split) < 60
    assert not list(tmp_path.iterdir())


def test_the_usual_waiting_is_compared_with_what_gptpipe_or_the_user_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
    for present, name in (
        ({"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "1"}, "GOMP_SPINCOUNT=7, KMP_BLOCKTIME=1"),
        ({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY=passive"),
    ):
        monkeypatch.setattr("os.environ", {"HOME": "/", **present})
        assert shared_machine.environments() == {
            "as usual": {"HOME": "/", **usual},
            name: {"HOME": "/", **present},
        }


def test_a_turn_has_at_least_one_step() -> None:
    steps: list[int] = []
    assert shared_machine.mean_seconds(lambda: steps.append(1), 0.0) > 0
    assert len(steps) == 1

"""What the type checker does not see of benchmarks: what they run, and the arithmetic of their tables."""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import benchmarks
from benchmarks import nanochat, shared_machine
from benchmarks.overheads import seconds_to_first_validation


def test_benchmarks_limit_busy_waiting_as_commands_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    importlib.reload(benchmarks)
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


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


@pytest.mark.parametrize(
    ("step", "progress", "lr", "momentum", "weight_decay"),
    [
        (0, 0.0, 1 / 40, 0.85, 0.4),  # warm-up
        (200, 0.2, 1.0, 0.91, 0.2 * (1 + 0.80901699)),  # cos(pi / 5)
        (500, 0.35, 1.0, 0.97, 0.2 * (1 + 0.45399050)),  # the warm-down starts
        (500, 0.675, 0.525, 0.935, 0.2 * (1 - 0.52249856)),  # half of it
        (500, 1.0, 0.05, 0.90, 0.0),
    ],
)
def test_nanochats_schedule_is_that_of_base_train(
    step: int, progress: float, lr: float, momentum: float, weight_decay: float
) -> None:
    """Expected values: its get_lr_multiplier, get_muon_momentum and get_weight_decay at these shares."""
    muon = {"kind": "muon", "initial_lr": 1.0}
    adamw = {"kind": "adamw", "initial_lr": 2.0}
    nanochat.set_schedule(SimpleNamespace(param_groups=[muon, adamw]), step, progress, 0.4)
    assert muon == pytest.approx(
        {"kind": "muon", "initial_lr": 1.0, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    )
    assert adamw == pytest.approx({"kind": "adamw", "initial_lr": 2.0, "lr": 2 * lr})

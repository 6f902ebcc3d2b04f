"""Learning rates at chosen steps, worked out by hand: lr 1.0, warm-up of 10, 110 steps, to a tenth."""

import math
from itertools import pairwise
from typing import Any

import pytest
import tiny

from gptpipe.train.params import TrainParams
from gptpipe.train.schedule import learning_rate, steps_before_the_end_matters

N_STEPS = 110
SCHEDULES = ("cosine", "wsd", "linear", "constant")


def section(schedule: str, **changes: Any) -> TrainParams:
    base = {
        "lr": 1.0,
        "warmup_steps": 10,
        "final_lr_fraction": 0.1,
        "decay_fraction": 0.5,
        "max_steps": N_STEPS,
    }
    return TrainParams(**{**tiny.TRAIN, **base, "schedule": schedule, **changes})


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: 0.1 + 0.9 * 0.8535533906, 60: 0.55, 110: 0.1}),
        ("linear", {0: 0.1, 9: 1.0, 10: 1.0, 35: 0.775, 60: 0.55, 110: 0.1}),
        ("wsd", {0: 0.1, 9: 1.0, 10: 1.0, 55: 1.0, 66: 0.82, 110: 0.1}),
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 60: 1.0, 109: 1.0}),
    ],
)
def test_the_learning_rate_at_given_steps(schedule: str, points: dict[int, float]) -> None:
    found = {step: learning_rate(step, N_STEPS, section(schedule)) for step in points}
    assert found == pytest.approx(points)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 10, 100])
def test_the_learning_rate_is_positive_at_most_lr_and_never_rises_after_the_warmup(
    schedule: str, warmup: int
) -> None:
    rates = [learning_rate(step, N_STEPS, section(schedule, warmup_steps=warmup)) for step in range(N_STEPS)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 10, 54, 55, 56, 60, 100, 109])
@pytest.mark.parametrize("decay_fraction", [0.1, 0.5, 1.0])
def test_the_learning_rate_has_no_jumps(schedule: str, warmup: int, decay_fraction: float) -> None:
    """No step changes it more than the largest of a straight warm-up, a straight decay, the steepest cosine."""
    params = section(schedule, warmup_steps=warmup, decay_fraction=decay_fraction)
    rates = [learning_rate(step, N_STEPS, params) for step in range(N_STEPS + 1)]  # the last one would be next
    n_decaying = N_STEPS - warmup
    if schedule == "wsd":
        n_decaying = min(n_decaying, round(decay_fraction * N_STEPS))
    steepest = max(1 / max(1, warmup), 1 / n_decaying * (math.pi / 2 if schedule == "cosine" else 1))
    assert max(abs(after - before) for before, after in pairwise(rates)) <= steepest + 1e-9
    assert rates[warmup] == 1.0


def test_a_decay_that_would_begin_in_the_warmup_begins_after_it() -> None:
    """Warm-up of 66 steps, decay over the last 55 of 110: it begins at 66 and ends at a tenth."""
    found = {step: learning_rate(step, N_STEPS, section("wsd", warmup_steps=66)) for step in (65, 66, 88, 110)}
    assert found == pytest.approx({65: 1.0, 66: 1.0, 88: 0.55, 110: 0.1})


@pytest.mark.parametrize(
    ("schedule", "n_steps"),
    # linear and cosine: the first step after the warm-up is at the peak; wsd: the last 55 steps decay from it
    [("constant", 110), ("wsd", 56), ("linear", 11), ("cosine", 11)],
)
def test_steps_whose_learning_rate_does_not_depend_on_the_length(schedule: str, n_steps: int) -> None:
    assert steps_before_the_end_matters(N_STEPS, section(schedule)) == n_steps

"""Each red flag on a made-up history that shows it, and none on a healthy one."""

from collections.abc import Sequence

import numpy as np
import pytest

from gptpipe.train.red_flags import final_red_flags, red_flags
from gptpipe.train.state import Validation


def history(
    val: Sequence[float], train: Sequence[float], peak: float | None = None, clipped: float = 0.0
) -> list[Validation]:
    """Validations every 100 steps. `train` has one value less, because step 0 has no training loss."""
    start = Validation(step=0, val_loss=val[0], train_loss=None, max_train_loss=None, clipped=None)
    later = [
        Validation(step=100 * i, val_loss=v, train_loss=t, max_train_loss=peak or t * 1.1, clipped=clipped)
        for i, (v, t) in enumerate(zip(val[1:], train, strict=True), start=1)
    ]
    return [start, *later]


HEALTHY = history([8.0, 5.0, 4.2, 3.8, 3.6, 3.5, 3.45], [6.0, 4.6, 4.0, 3.6, 3.4, 3.3])


@pytest.mark.parametrize("n_done", range(1, 8))
def test_a_healthy_training_never_has_a_red_flag(n_done: int) -> None:
    assert red_flags(HEALTHY[:n_done], 600) == {}


def test_overfitting_needs_validation_to_rise_while_training_falls() -> None:
    val, train = [8.0, 4.0, 3.5, 3.6, 3.8], [5.0, 3.4, 3.0, 2.5]
    flags = red_flags(history(val, train), 400)
    assert set(flags) == {"overfitting"}
    assert "from 3.500 (step 200) to 3.800" in flags["overfitting"]
    assert red_flags(history(val, [5.0, 3.4, 3.6, 3.7]), 400) == {}  # both rise: not overfitting
    assert red_flags(history(val[:4], train[:3]), 400) == {}  # once is noise


def test_a_single_step_far_above_the_start_is_an_explosion() -> None:
    flags = red_flags(history([8.0, 5.0, 4.0], [6.0, 4.5], peak=12.5), 600)
    assert set(flags) == {"exploding", "lr_too_high"}
    assert "from 8.000 at the start to 12.500" in flags["exploding"]


def test_training_loss_that_climbs_back_is_an_explosion() -> None:
    flags = red_flags(history([8.0, 5.0, 4.0, 5.5], [6.0, 4.5, 5.6]), 600)
    assert {"exploding", "lr_too_high"} <= set(flags)
    assert "from 4.500 to 5.600" in flags["exploding"]


def test_a_constant_loss_is_not_decreasing_and_its_learning_rate_too_low() -> None:
    flags = red_flags(history([8.0, 7.99, 7.98, 7.97], [8.0, 7.99, 7.98]), 600)
    assert set(flags) == {"not_decreasing", "lr_too_low"}


def test_a_constant_loss_with_clipping_at_every_step_has_too_high_a_learning_rate() -> None:
    flags = red_flags(history([8.0, 7.99, 8.3, 8.0], [8.0, 8.1, 8.05], clipped=1.0), 600)
    assert set(flags) == {"not_decreasing", "lr_too_high"}


def test_a_slow_straight_descent_has_too_low_a_learning_rate() -> None:
    flags = red_flags(history([8.0, 7.7, 7.4, 7.1, 6.8, 6.5], [7.9, 7.6, 7.3, 7.0, 6.7]), 500)
    assert set(flags) == {"lr_too_low"}


@pytest.mark.parametrize(
    ("val", "train"),
    [
        ([8.0, 6.0, 5.5, 6.5, 7.9], [7.0, 5.6, 5.5, 5.4]),  # back where it began
        ([5.0, 5.1, 5.2, 5.3, 5.35], [5.0, 5.05, 5.1, 5.1]),  # rises, and ever more slowly
    ],
)
def test_a_rising_loss_is_never_called_too_slow(val: list[float], train: list[float]) -> None:
    assert "lr_too_low" not in red_flags(history(val, train), 400)


@pytest.mark.parametrize(
    ("val", "train", "peak", "expected"),
    [
        # Once above the start.
        ([8.0, 4.0, 3.5, 3.6, 3.8], [5.0, 3.4, 3.0, 2.5], 12.5, {"exploding", "lr_too_high"}),
        # Higher than it was, but falling.
        ([8.0, 5.0, 5.2, 5.5], [4.0, 5.4, 5.0], None, {"exploding", "lr_too_high"}),
        # Flat by its size, yet it rises as training improves.
        ([8.0, 8.04, 8.09], [7.8, 7.5], None, {"overfitting"}),
        # Rises too little to matter, and is not slow.
        ([8.0, 8.01, 8.02], [8.1, 8.2], None, {"not_decreasing"}),
    ],
)
def test_flags_do_not_contradict_each_other(
    val: list[float], train: list[float], peak: float | None, expected: set[str]
) -> None:
    assert set(red_flags(history(val, train, peak), 100 * len(train))) == expected


def test_no_history_has_flags_that_contradict_each_other() -> None:
    """Random walks of both losses. Both advise a higher or lower learning rate or less fitting, never two."""
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    for _ in range(2000):
        walks = 8.0 + rng.normal(rng.normal(0, 0.3), rng.exponential(0.3), (2, 6)).cumsum(1)
        val, train = ([round(max(0.1, float(x)), 3) for x in walk] for walk in walks)
        peak = float(rng.choice([9.0, 13.0]))
        flags = set(final_red_flags(history([8.0, *val], train, peak, float(rng.integers(2))), 600))
        assert len(flags & {"exploding", "overfitting", "lr_too_low"}) <= 1
        assert not flags >= {"lr_too_high", "lr_too_low"}
        assert not flags >= {"overfitting", "not_decreasing"}
        assert not flags >= {"overfitting", "lr_too_high"}
        seen |= flags
    assert seen == {"exploding", "overfitting", "lr_too_low", "lr_too_high", "not_decreasing", "untrained"}


def test_a_model_from_before_the_first_step_is_untrained() -> None:
    worse = history([8.0, 8.2, 8.4], [8.1, 8.3])
    flags = final_red_flags(worse, 200)
    assert "no later validation loss was below 8.000" in flags["untrained"]
    assert "untrained" not in red_flags(worse, 200)  # it may still improve
    assert "untrained" not in final_red_flags(history([8.0, 8.2, 7.9], [8.1, 8.0]), 200)


def test_no_flag_about_the_learning_rate_before_a_fifth_of_the_steps() -> None:
    assert red_flags(history([8.0, 7.99, 7.98], [8.0, 7.99]), 1001) == {}

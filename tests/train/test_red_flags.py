"""Each red flag on a made-up history that shows it, and none on a healthy one."""

from collections.abc import Sequence

import pytest

from gptpipe.train.red_flags import red_flags
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
    assert set(red_flags(history([8.0, 7.99, 7.98, 7.97], [8.0, 7.99, 7.98]), 600)) == {"not_decreasing", "lr_too_low"}


def test_a_constant_loss_with_clipping_at_every_step_has_too_high_a_learning_rate() -> None:
    flags = red_flags(history([8.0, 7.99, 8.3, 8.0], [8.0, 8.1, 8.05], clipped=1.0), 600)
    assert set(flags) == {"not_decreasing", "lr_too_high"}


def test_a_slow_straight_descent_has_too_low_a_learning_rate() -> None:
    assert set(red_flags(history([8.0, 7.7, 7.4, 7.1, 6.8, 6.5], [7.9, 7.6, 7.3, 7.0, 6.7]), 500)) == {"lr_too_low"}


@pytest.mark.parametrize(
    ("val", "train"),
    [
        ([8.0, 6.0, 5.5, 6.5, 7.9], [7.0, 5.6, 5.5, 5.4]),  # back where it began
        ([5.0, 5.1, 5.2, 5.3, 5.35], [5.0, 5.05, 5.1, 5.1]),  # rises, and ever more slowly
    ],
)
def test_a_rising_loss_is_never_called_too_slow(val: list[float], train: list[float]) -> None:
    assert "lr_too_low" not in red_flags(history(val, train), 400)


def test_no_flag_about_the_learning_rate_before_a_fifth_of_the_steps() -> None:
    assert red_flags(history([8.0, 7.99, 7.98], [8.0, 7.99]), 1001) == {}

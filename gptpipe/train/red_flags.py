"""Signs that a training is going wrong, and what to try."""

from collections.abc import Sequence

from gptpipe.train.state import Validation


def red_flags(history: Sequence[Validation], n_steps: int) -> dict[str, str]:
    """Warnings by name, for a history that begins with the validation at step 0.

    Of exploding, overfitting and a learning rate that is too low, at most one is reported, because their advice
    is opposite. Nothing can be said about an unstable training but that it explodes. An overfitting network has
    learned, so its loss counts neither as flat nor as too slow.
    """
    flags: dict[str, str] = {}
    trained = [v for v in history if v.train_loss is not None]
    if not trained:
        return flags
    start, last = history[0], trained[-1]
    best = _best(history)
    rise = _rise(start, trained)
    if rise:
        flags["exploding"] = (
            f"exploding: training loss rose {rise}; lower train.lr, lengthen train.warmup_steps or lower "
            "train.grad_clip"
        )
    elif _is_overfitting(best, trained):
        flags["overfitting"] = (
            f"overfitting: validation loss rose from {best.val_loss:.3f} (step {best.step}) "
            f"to {last.val_loss:.3f} while training loss fell; "
            "add text or dropout, shrink the model, or set train.patience"
        )
        return flags
    enough = last.step >= 0.2 * n_steps and len(trained) >= 2
    if enough and best.val_loss > 0.98 * start.val_loss:
        flags["not_decreasing"] = (
            f"not decreasing: validation loss is {last.val_loss:.3f} after {last.step} steps, "
            f"{start.val_loss:.3f} at the start; check train.lr and the data"
        )
    if "exploding" in flags or ("not_decreasing" in flags and (last.clipped or 0.0) > 0.9):
        flags["lr_too_high"] = "learning rate too high by these signs: try a third of train.lr"
    elif enough and _falls_too_slowly(history):
        flags["lr_too_low"] = (
            "learning rate too low by the shape of the curve: validation loss falls as slowly as at the start "
            "and has not begun to level off; try three times train.lr"
        )
    return flags


def final_red_flags(history: Sequence[Validation], n_steps: int) -> dict[str, str]:
    """The red flags of a finished training. It writes the model with the lowest validation loss."""
    flags = red_flags(history, n_steps)
    best = _best(history)
    if best.step == 0:
        flags["untrained"] = (
            "untrained: the model has the weights from before the first step, "
            f"because no later validation loss was below {best.val_loss:.3f}; check train.lr and the data"
        )
    return flags


def _best(history: Sequence[Validation]) -> Validation:
    return min(history, key=lambda validation: validation.val_loss)


def _rise(start: Validation, trained: Sequence[Validation]) -> str | None:
    """From where to where the training loss rose; None if it did not rise far."""
    peak = max(v.max_train_loss or 0.0 for v in trained)
    if peak > 1.5 * start.val_loss:
        return f"from {start.val_loss:.3f} at the start to {peak:.3f}"
    losses = _train_losses(trained)
    if losses[-1] > 1.2 * min(losses):
        return f"from {min(losses):.3f} to {losses[-1]:.3f}"
    return None


def _is_overfitting(best: Validation, trained: Sequence[Validation]) -> bool:
    """Whether validation loss was above its best at least twice, lately by over 1%, and training loss fell."""
    after_best = [v for v in trained if v.step > best.step]
    if len(after_best) < 2 or trained[-1].val_loss <= 1.01 * best.val_loss:
        return False
    losses = _train_losses(after_best)
    return losses[-1] < losses[0]


def _train_losses(trained: Sequence[Validation]) -> list[float]:
    return [v.train_loss for v in trained if v.train_loss is not None]


def _falls_too_slowly(history: Sequence[Validation]) -> bool:
    """Whether validation loss moved by under 2% in all, or fell little and still at over 0.7 of its first rate.

    The rates are those of the first and the last third.
    """
    losses = [v.val_loss for v in history]
    if losses[-1] > losses[0]:
        return False
    if max(losses) < 1.02 * min(losses):
        return True
    third = len(history) // 3
    if third < 1 or losses[-1] < 0.6 * losses[0]:
        return False

    def rate(earlier: Validation, later: Validation) -> float:
        return (earlier.val_loss - later.val_loss) / max(1, later.step - earlier.step)

    first, final = rate(history[0], history[third]), rate(history[-1 - third], history[-1])
    return final > 0.7 * first > 0

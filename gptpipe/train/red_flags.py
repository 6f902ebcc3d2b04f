"""Signs that a training is going wrong, and what to try."""

from collections.abc import Sequence

from gptpipe.train.state import Validation


def red_flags(history: Sequence[Validation], n_steps: int) -> dict[str, str]:
    """Warnings by name, for a history that begins with the validation at step 0."""
    flags: dict[str, str] = {}
    trained = [v for v in history if v.train_loss is not None]
    if not trained:
        return flags
    start, last = history[0], trained[-1]
    best = min(history, key=lambda v: v.val_loss)
    losses = [v.train_loss for v in trained if v.train_loss is not None]
    after_best = [v for v in trained if v.step > best.step]
    if len(after_best) >= 2 and last.val_loss > 1.01 * best.val_loss and losses[-1] < losses[-len(after_best)]:
        flags["overfitting"] = (
            f"overfitting: validation loss rose from {best.val_loss:.3f} (step {best.step}) to {last.val_loss:.3f} "
            "while training loss fell; add text or dropout, shrink the model, or set train.patience"
        )
    peak = max(v.max_train_loss or 0.0 for v in trained)
    rise = None
    if peak > 1.5 * start.val_loss:
        rise = f"from {start.val_loss:.3f} at the start to {peak:.3f}"
    elif losses[-1] > 1.2 * min(losses):
        rise = f"from {min(losses):.3f} to {losses[-1]:.3f}"
    if rise:
        flags["exploding"] = (
            f"exploding: training loss rose {rise}; lower train.lr, lengthen train.warmup_steps or lower "
            "train.grad_clip"
        )
    enough = last.step >= 0.2 * n_steps and len(trained) >= 2
    if enough and best.val_loss > 0.98 * start.val_loss:
        flags["not_decreasing"] = (
            f"not decreasing: validation loss is {last.val_loss:.3f} after {last.step} steps, {start.val_loss:.3f} at "
            "the start; check train.lr and the data"
        )
    if "exploding" in flags or ("not_decreasing" in flags and (last.clipped or 0.0) > 0.9):
        flags["lr_too_high"] = "learning rate too high by these signs: try a third of train.lr"
    elif enough and _falls_too_slowly(history):
        flags["lr_too_low"] = (
            "learning rate too low by the shape of the curve: validation loss falls as slowly as at the start and has "
            "not begun to level off; try three times train.lr"
        )
    return flags


def _falls_too_slowly(history: Sequence[Validation]) -> bool:
    """Whether validation loss moved by under 2% in all, or fell little and still at over 0.7 of its first rate.

    The rates are those of the first and the last third.
    """
    losses = [v.val_loss for v in history]
    if max(losses) < 1.02 * min(losses):
        return True
    third = len(history) // 3
    if third < 1 or losses[-1] < 0.6 * losses[0]:
        return False

    def rate(earlier: Validation, later: Validation) -> float:
        return (earlier.val_loss - later.val_loss) / max(1, later.step - earlier.step)

    first, final = rate(history[0], history[third]), rate(history[-1 - third], history[-1])
    return final > 0.7 * first > 0

"""The state of a training: all that a step changes, and all that a checkpoint holds."""

import math
from dataclasses import dataclass, field

import torch

from gptpipe.model.gpt import GPT

Metrics = dict[str, float]
Entry = tuple[int, int, Metrics]  # step, milliseconds since 1970, what was logged
VALIDATION_METRICS = ("loss", "perplexity", "bits_per_byte", "token_accuracy")  # those that a training keeps
Sample = tuple[int, str, str]  # step, prompt, continuation


@dataclass(frozen=True)
class Validation:
    """One validation: the loss on the validation split, and the mean training loss since the validation before it."""

    step: int
    val_loss: float  # nats per token
    train_loss: float | None  # none at step 0
    max_train_loss: float | None  # of a single step since the validation before
    clipped: float | None  # share of steps whose gradient was clipped


@dataclass
class TrainState:
    """All that a step changes; what a checkpoint holds."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    micro_batch_size: int  # sequences at once; halved where memory runs out
    step: int = 0  # optimizer steps done
    skipped: int = 0  # batches that were passed over after a spike
    history: list[Validation] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)  # (loss, gradient norm) of each step
    journal: list[Entry] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest loss, the first of equals."""
        return min(self.history, key=lambda v: v.val_loss, default=None)

    @property
    def best_is_now(self) -> bool:
        return self.best is not None and self.best.step == self.step

    @property
    def is_validated(self) -> bool:
        """Whether the present weights have been validated."""
        return bool(self.history) and self.history[-1].step == self.step

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` validations brought no new best."""
        if patience is None or self.best is None:
            return False
        return sum(v.step > self.best.step for v in self.history) >= patience

    def note_validation(self, val_loss: float, grad_clip: float | None) -> None:
        since = self.steps[self.history[-1].step if self.history else 0 :]
        losses = [loss for loss, _ in since]
        clipped = [norm > (grad_clip or math.inf) for _, norm in since]
        self.history.append(
            Validation(
                step=self.step,
                val_loss=val_loss,
                train_loss=sum(losses) / len(losses) if losses else None,
                max_train_loss=max(losses, default=None),
                clipped=sum(clipped) / len(clipped) if clipped else None,
            )
        )

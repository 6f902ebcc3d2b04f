"""The state of a training: everything that a step changes, and everything that a checkpoint holds."""

import math
from dataclasses import dataclass, field

import torch

from gptpipe.model.gpt import GPT
from gptpipe.score.metrics import Metrics

Entry = tuple[int, int, Metrics]  # of the journal: step, milliseconds since 1970, metrics
Sample = tuple[int, str, str]  # step, prompt, continuation


@dataclass(frozen=True)
class Validation:
    """One validation: the loss on the validation split, and the training since the previous validation."""

    step: int
    val_loss: float  # nats per token
    train_loss: float | None  # mean; None at step 0
    max_train_loss: float | None  # of a single step
    clipped: float | None  # share of steps whose gradient was clipped


@dataclass
class TrainState:
    """Everything that a step changes."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    micro_batch_size: int  # sequences per pass; halved if memory runs out
    step: int = 0  # optimizer steps done
    skipped: int = 0  # batches skipped after spikes
    history: list[Validation] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)  # (loss, gradient norm) of each step
    journal: list[Entry] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest loss, the first of equal ones."""
        return min(self.history, key=lambda validation: validation.val_loss, default=None)

    @property
    def is_best(self) -> bool:
        """Whether the current weights have the lowest validation loss so far."""
        return self.best is not None and self.best.step == self.step

    @property
    def is_validated(self) -> bool:
        """Whether the current weights have been validated."""
        return bool(self.history) and self.history[-1].step == self.step

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` validations brought no new best."""
        if patience is None or self.best is None:
            return False
        return sum(validation.step > self.best.step for validation in self.history) >= patience

    def add_validation(self, val_loss: float, grad_clip: float | None) -> None:
        """Append to the history, with a summary of the steps since the previous validation."""
        since = self.steps[self.history[-1].step if self.history else 0 :]
        losses = [loss for loss, _ in since]
        is_clipped = [norm > (grad_clip or math.inf) for _, norm in since]
        self.history.append(
            Validation(
                step=self.step,
                val_loss=val_loss,
                train_loss=sum(losses) / len(losses) if losses else None,
                max_train_loss=max(losses, default=None),
                clipped=sum(is_clipped) / len(is_clipped) if is_clipped else None,
            )
        )

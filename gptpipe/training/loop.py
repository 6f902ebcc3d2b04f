"""The training loop. It advances a state; where things are validated, saved and logged is told from outside."""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from gptpipe.config import TrainParams
from gptpipe.environment import place
from gptpipe.errors import NumericError
from gptpipe.model.device import autocast, whole
from gptpipe.model.gpt import GPT
from gptpipe.model.optim import set_lr
from gptpipe.tokens.batches import Batches
from gptpipe.training import distributed
from gptpipe.training.red_flags import Validation
from gptpipe.training.schedule import learning_rate

Metrics = dict[str, float]
Entry = tuple[int, int, Metrics]  # step, milliseconds since 1970, what was logged

_REMEDY = "lower train.lr, lengthen train.warmup_steps, or set train.precision to float32"


@dataclass
class TrainState:
    """All that a step changes; what a checkpoint holds."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    step: int = 0  # optimizer steps done
    history: list[Validation] = field(default_factory=list)
    since_validation: list[tuple[float, float]] = field(default_factory=list)  # (loss, gradient norm) of each step
    journal: list[Entry] = field(default_factory=list)

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
        losses = [loss for loss, _ in self.since_validation]
        clipped = [norm > (grad_clip or math.inf) for _, norm in self.since_validation]
        self.history.append(
            Validation(
                step=self.step,
                val_loss=val_loss,
                train_loss=sum(losses) / len(losses) if losses else None,
                max_train_loss=max(losses, default=None),
                clipped=sum(clipped) / len(clipped) if clipped else None,
            )
        )
        self.since_validation = []


@dataclass(frozen=True)
class Plan:
    """What stays fixed through a training."""

    params: TrainParams
    n_steps: int
    micro_batch_size: int
    seed: int
    precision: torch.dtype
    loss: distributed.LossFunction  # the model's own, or its compiled form


def train(
    state: TrainState,
    batches: Batches,
    plan: Plan,
    *,
    validate: Callable[[], float],
    report: Callable[[], None],
    save: Callable[[], None],
    log: Callable[[int, Metrics], None],
    check_stop: Callable[[], None],
) -> None:
    """Advance `state` to the plan's last step, or until patience runs out; a restored state simply continues.

    `validate` returns the validation loss and is called at step 0, every `eval_every` steps and at the end, `report`
    once that loss is in the state; `save` makes the state durable. `check_stop` may raise between steps, `validate` at
    any moment: the state is then fit to be saved, and goes on from there.
    Raises NumericError before an update that would not be finite, and for a validation loss that is not.
    """
    params = plan.params

    def validate_if_due() -> None:
        is_due = state.step % params.eval_every == 0 or state.step == plan.n_steps
        if is_due and not state.is_validated:
            loss = validate()
            if not math.isfinite(loss):
                raise NumericError(f"train: validation loss is {loss} after step {state.step}; {_REMEDY}")
            state.note_validation(loss, params.grad_clip)
            report()

    validate_if_due()
    while state.step < plan.n_steps and not state.is_out_of_patience(params.patience):
        check_stop()
        metrics = optimizer_step(state, batches, plan)
        log(state.step, metrics)
        validate_if_due()
        if state.step % params.save_every == 0 or state.step == plan.n_steps:
            save()


def optimizer_step(state: TrainState, batches: Batches, plan: Plan) -> Metrics:
    """One update from `batch_size` sequences, in micro-batches; returns what there is to log.

    The gradient is that of the mean over all tokens of the step, whatever the micro-batches are.
    """
    started = time.perf_counter()
    params, model = plan.params, state.model
    device = model.embedding.weight.device
    part = distributed.share(params)  # of the B sequences, over all ranks
    tokens, targets = (x.to(device, non_blocking=True) for x in batches.at(state.step, part))  # (B / ranks, T) each
    lr = learning_rate(state.step, plan.n_steps, params)
    set_lr(state.optimizers, lr)
    n_micro_batches = len(tokens) // plan.micro_batch_size
    total = torch.zeros((), device=device)
    for i, (x, y) in enumerate(zip(tokens.chunk(n_micro_batches), targets.chunk(n_micro_batches), strict=True)):
        if model.params.dropout:  # seeded by position in the batch: resuming and sampling cannot disturb it
            torch.manual_seed(_seed(plan.seed, state.step, part.start // plan.micro_batch_size + i))
        with nullcontext() if i == n_micro_batches - 1 else getattr(plan.loss, "no_sync", nullcontext)():  # of DDP
            with autocast(device, plan.precision):
                loss = plan.loss(x, y) / n_micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / place().n_ranks
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip or math.inf))
    figures = {"train/loss": distributed.all_reduce(total).item(), "train/grad_norm": norm.item()}
    if not all(map(math.isfinite, figures.values())):
        raise NumericError(
            f"train: step {state.step + 1}: loss {figures['train/loss']}, gradient norm {figures['train/grad_norm']}; "
            f"stopped before the update: {_REMEDY}"
        )
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.since_validation.append((figures["train/loss"], figures["train/grad_norm"]))
    seconds = time.perf_counter() - started
    return {**figures, "train/lr": lr, "train/tokens_per_second": params.batch_size * tokens.shape[1] / seconds}


def _seed(seed: int, step: int, micro_step: int) -> int:
    """A seed of its own for each micro-batch."""
    digest = hashlib.blake2b(f"dropout:{seed}:{step}:{micro_step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

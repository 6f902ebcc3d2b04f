"""The training loop. It advances a state; where things are validated, saved and logged is told from outside."""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gptpipe.model.device import autocast, gather, is_out_of_memory
from gptpipe.shell.environment import place
from gptpipe.shell.errors import NumericError, ResourceError, SpikeError
from gptpipe.train import distributed
from gptpipe.train.batches import Batches
from gptpipe.train.optim import set_lr
from gptpipe.train.params import TrainParams
from gptpipe.train.schedule import learning_rate
from gptpipe.train.state import Metrics, TrainState

_REMEDY = "lower train.lr, lengthen train.warmup_steps, or set train.precision to float32"
# A spike is told against so many steps before it, once there are enough; less spread than this is taken for this.
_RECENT, _ENOUGH = 100, 20
_LEAST_SPREAD = {"loss": 0.05, "gradient norm": 0.25}  # nats per token; of the norm's logarithm


@dataclass(frozen=True)
class Plan:
    """What stays fixed through a training."""

    params: TrainParams
    n_steps: int
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
    roll_back: Callable[[NumericError], None],
    log: Callable[[int, Metrics], None],
    check_stop: Callable[[], None],
) -> None:
    """Advance `state` to the plan's last step, or until patience runs out; a restored state simply continues.

    `validate` returns the validation loss and is called at step 0, every `eval_every` steps and at the end, `report`
    once that loss is in the state. `save` makes the state durable; `roll_back` makes it what was saved last, or raises
    the error that it is given, and the batches since then are passed over, with the one that failed. `check_stop` may
    raise between steps, `validate` at any moment: the state is then fit to be saved, and goes on from there.
    Raises NumericError before an update that would not be finite, or after a spike, if `on_spike` is `stop`; and for a
    validation loss that is not finite. Raises ResourceError if not even single sequences fit in memory.
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
    if params.on_spike == "rollback" and state.step == 0:
        save()
    while state.step < plan.n_steps and not state.is_out_of_patience(params.patience):
        check_stop()
        try:
            metrics = optimizer_step(state, batches, plan)
        except NumericError as error:
            if params.on_spike == "stop":
                raise
            position = state.step + state.skipped
            roll_back(error)
            state.skipped = position + 1 - state.step
            continue
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
    windows = batches.at(state.step + state.skipped, part)  # (B / ranks, T) each
    tokens, targets = (x.to(device, non_blocking=True) for x in windows)
    lr = learning_rate(state.step, plan.n_steps, params)
    set_lr(state.optimizers, lr)
    micro_batch_size = state.micro_batch_size
    loss = distributed.all_reduce(_backward(state, plan, tokens, targets, part.start)).item()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = gather(nn.utils.get_total_norm(gradients)).item()
    if fault := _fault(loss, norm, state.steps[-_RECENT:], params.spike_sigmas):
        model.zero_grad(set_to_none=True)
        kind = SpikeError if math.isfinite(loss) and math.isfinite(norm) else NumericError
        raise kind(f"train: step {state.step + 1}: {fault}; stopped before the update: {_REMEDY}")
    if params.grad_clip is not None and norm > params.grad_clip:
        scale = torch.tensor(params.grad_clip / norm, device=device)  # a plain number would be converted for each
        torch._foreach_mul_(gradients, scale)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.steps.append((loss, norm))
    metrics = {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr}
    if state.micro_batch_size < micro_batch_size:
        metrics["train/micro_batch_size"] = state.micro_batch_size
    seconds = time.perf_counter() - started
    return {**metrics, "train/tokens_per_second": params.batch_size * tokens.shape[1] / seconds}


def _backward(state: TrainState, plan: Plan, tokens: Tensor, targets: Tensor, first: int) -> Tensor:
    """Gradients of the mean loss over this rank's (B, T) tokens, and its share of the loss over all ranks.

    In smaller micro-batches if memory runs out. `first` is the place in the batch of the first sequence.
    """
    model = state.model
    n_micro_batches = len(tokens) // state.micro_batch_size
    total = torch.zeros((), device=tokens.device)
    try:
        for i, (x, y) in enumerate(zip(tokens.chunk(n_micro_batches), targets.chunk(n_micro_batches), strict=True)):
            if model.params.dropout:  # seeded by place in the batch: resuming and sampling cannot disturb it
                torch.manual_seed(_seed(plan.seed, state.step, first // state.micro_batch_size + i))
            with nullcontext() if i == n_micro_batches - 1 else getattr(plan.loss, "no_sync", nullcontext)():  # of DDP
                with autocast(tokens.device, plan.precision):
                    loss = plan.loss(x, y) / n_micro_batches
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach() / place().n_ranks
        return total
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if place().n_ranks > 1:  # the others wait for its gradients
            raise ResourceError(
                f"train: step {state.step + 1}: out of memory with micro-batches of {state.micro_batch_size}; lower "
                "train.micro_batch_size or the model, or set train.activation_checkpointing to true"
            ) from error
    # Outside of the handler: the error's traceback holds on to the activations.
    model.zero_grad(set_to_none=True)
    state.micro_batch_size = distributed.halved(state.micro_batch_size, len(tokens))
    return _backward(state, plan, tokens, targets, first)


def _fault(loss: float, norm: float, recent: list[tuple[float, float]], sigmas: float | None) -> str | None:
    """What forbids an update: a loss or gradient norm that is not finite, or far above those of recent steps."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss}, gradient norm {norm}"
    if sigmas is None or len(recent) < _ENOUGH:
        return None
    losses, norms = np.array(recent).T
    # Norms are compared by their logarithms: they vary by factors.
    for name, value, compared, usual in (
        ("loss", loss, loss, losses),
        ("gradient norm", norm, math.log(max(norm, 1e-30)), np.log(np.maximum(norms, 1e-30))),
    ):
        spread = max(float(usual.std()), _LEAST_SPREAD[name])
        if (above := (compared - float(usual.mean())) / spread) > sigmas:
            return f"{name} {value:.4g} spikes, {above:.1f} standard deviations above the last {len(recent)} steps"
    return None


def _seed(seed: int, step: int, micro_step: int) -> int:
    """A seed of its own for each micro-batch."""
    digest = hashlib.blake2b(f"dropout:{seed}:{step}:{micro_step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

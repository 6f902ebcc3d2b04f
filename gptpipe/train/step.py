"""One optimizer step: computes the gradients of a batch, updates the weights and returns the metrics to log."""

import hashlib
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gptpipe.model.device import autocast, gather, is_out_of_memory
from gptpipe.score.metrics import Metrics
from gptpipe.shell.environment import rank_info
from gptpipe.shell.errors import NumericError, ResourceError, SpikeError
from gptpipe.train.batches import Batches
from gptpipe.train.distributed import LossFunction, all_reduce, batch_slice
from gptpipe.train.memory import SMALLER_BATCHES, halved
from gptpipe.train.optim import set_lr
from gptpipe.train.params import TrainParams
from gptpipe.train.schedule import learning_rate
from gptpipe.train.state import TrainState

STABILITY_ADVICE = "lower train.lr, lengthen train.warmup_steps, or set train.precision to float32"
_ROLL_BACK_ADVICE = (
    "; with train.on_spike: rollback it continues from the last checkpoint, without these batches"
)
# A spike is measured against the last 100 steps, once there are 20.
_MAX_RECENT, _MIN_RECENT = 100, 20
_MIN_LOSS_SPREAD = 0.05  # nats per token; a smaller standard deviation counts as this
_MIN_NORM_SPREAD = 0.25  # the same for the logarithm of the gradient norm


@dataclass(frozen=True)
class Plan:
    """What stays fixed during a training."""

    params: TrainParams
    n_steps: int
    seed: int
    precision: torch.dtype
    loss: LossFunction  # the model's own, or its compiled or averaging form
    keep_at: int | None = None  # the step after which the state is kept, to extend the finished training


def optimizer_step(state: TrainState, batches: Batches, plan: Plan) -> Metrics:
    """Update the weights once, from `batch_size` sequences (B, T) in micro-batches; returns the metrics to log.

    The gradient is that of the mean over all tokens of the step, whatever the size of the micro-batches. If
    memory runs out, halves `state.micro_batch_size`. Raises NumericError, before any update, for a non-finite
    loss or gradient norm, or for a spike; and ResourceError if not even single sequences fit into memory.
    """
    started = time.perf_counter()
    params, model = plan.params, state.model
    device = model.embedding.weight.device
    own = batch_slice(params)
    tokens, targets = (x.to(device, non_blocking=True) for x in batches.at(state.step + state.skipped, own))
    lr = learning_rate(state.step, plan.n_steps, params)
    set_lr(state.optimizers, lr)
    micro_batch_size_before = state.micro_batch_size
    loss = all_reduce(_backward(state, plan, tokens, targets, own.start)).item()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = gather(nn.utils.get_total_norm(gradients)).item()
    advice = STABILITY_ADVICE + (_ROLL_BACK_ADVICE if params.on_spike == "stop" else "")
    try:
        _check_finite(state.step + 1, loss, norm, advice)
        _check_spike(state.step + 1, loss, norm, state.steps[-_MAX_RECENT:], params.spike_sigmas, advice)
    except NumericError:
        model.zero_grad(set_to_none=True)
        raise
    if params.grad_clip is not None and norm > params.grad_clip:
        # A Python number would be converted for each.
        scale = torch.tensor(params.grad_clip / norm, device=device)
        torch._foreach_mul_(gradients, scale)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.steps.append((loss, norm))
    metrics = {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr}
    if state.micro_batch_size < micro_batch_size_before:
        metrics["train/micro_batch_size"] = state.micro_batch_size
    seconds = time.perf_counter() - started
    metrics["train/tokens_per_second"] = params.batch_size * tokens.shape[1] / seconds
    return metrics


def _backward(state: TrainState, plan: Plan, tokens: Tensor, targets: Tensor, first: int) -> Tensor:
    """Compute the gradients of the mean loss over this rank's (B, T) tokens; returns its part of the loss.

    `first` is the position in the batch of the first sequence. If memory runs out, repeats with smaller
    micro-batches.
    """
    while True:
        try:
            return _backward_once(state, plan, tokens, targets, first)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # The other ranks wait for this rank's gradients, so it cannot repeat the pass alone.
            if rank_info().n_ranks > 1:
                raise ResourceError(
                    f"train: step {state.step + 1}: out of memory "
                    f"with micro-batches of {state.micro_batch_size}; {SMALLER_BATCHES}"
                ) from error
        # After the handler: the traceback of the error keeps the activations alive.
        state.model.zero_grad(set_to_none=True)
        state.micro_batch_size = halved(state.micro_batch_size, len(tokens))


def _backward_once(state: TrainState, plan: Plan, tokens: Tensor, targets: Tensor, first: int) -> Tensor:
    model = state.model
    n_micro_batches = len(tokens) // state.micro_batch_size
    first_micro_batch = first // state.micro_batch_size
    total = torch.zeros((), device=tokens.device)
    micro_batches = zip(tokens.chunk(n_micro_batches), targets.chunk(n_micro_batches), strict=True)
    for i, (x, y) in enumerate(micro_batches):
        if model.params.dropout:  # seeded by step and micro-batch, so resuming and sampling do not change it
            torch.manual_seed(_dropout_seed(plan.seed, state.step, first_micro_batch + i))
        is_last = i == n_micro_batches - 1
        with nullcontext() if is_last else _without_averaging(plan.loss):
            with autocast(tokens.device, plan.precision):
                loss = plan.loss(x, y) / n_micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / rank_info().n_ranks
    return total


def _without_averaging(loss: LossFunction) -> AbstractContextManager[object]:
    """With DDP: do not average gradients over the ranks yet.

    The last micro-batch averages the accumulated sum.
    """
    if isinstance(loss, nn.parallel.DistributedDataParallel):
        context: AbstractContextManager[object] = loss.no_sync()
        return context
    return nullcontext()


def _check_finite(step: int, loss: float, norm: float, advice: str) -> None:
    """Raises NumericError for a loss or a gradient norm that is not finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NumericError(
            f"train: step {step}: loss {loss}, gradient norm {norm}; stopped before the update: {advice}"
        )


def _check_spike(
    step: int, loss: float, norm: float, recent: list[tuple[float, float]], sigmas: float | None, advice: str
) -> None:
    """Raises SpikeError for a loss or gradient norm over `sigmas` standard deviations above recent steps."""
    if sigmas is None or len(recent) < _MIN_RECENT:
        return
    losses, norms = np.array(recent).T
    # Norms are compared by their logarithms, because they vary by factors.
    log_norm, log_norms = math.log(max(norm, 1e-30)), np.log(np.maximum(norms, 1e-30))
    for name, value, n_sigmas in (
        ("loss", loss, _sigmas_above(loss, losses, _MIN_LOSS_SPREAD)),
        ("gradient norm", norm, _sigmas_above(log_norm, log_norms, _MIN_NORM_SPREAD)),
    ):
        if n_sigmas > sigmas:
            raise SpikeError(
                f"train: step {step}: {name} {value:.4g} spikes, {n_sigmas:.1f} standard deviations "
                f"above the last {len(recent)} steps; stopped before the update: {advice}"
            )


def _sigmas_above(value: float, recent: npt.NDArray[np.float64], min_spread: float) -> float:
    spread = max(float(recent.std()), min_spread)
    return (value - float(recent.mean())) / spread


def _dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """A different seed for each micro-batch of the training."""
    digest = hashlib.blake2b(f"dropout:{seed}:{step}:{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

"""Training by several processes of torchrun: every rank runs the same program on its part of each batch.

With one process all of this does nothing. Rank 0 alone writes: to the disk, the record and the console.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from gptpipe.model.device import autocast, gather, is_out_of_memory, is_sharded
from gptpipe.model.gpt import GPT
from gptpipe.shell.console import console
from gptpipe.shell.environment import attempt, rank_info
from gptpipe.shell.errors import ConfigError, GptpipeError, Interrupted, NumericError, ResourceError
from gptpipe.train.memory import halved
from gptpipe.train.params import TrainParams

T = TypeVar("T")
LossFunction = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks. If one rank fails, all stop: one prints the error, the others raise SystemExit."""
    rank, n_ranks = rank_info()[:2]
    if n_ranks == 1:
        yield
        return
    store, _, _ = next(rendezvous("env://"))
    # torchrun keeps the store when it restarts the ranks. The prefix separates them from their predecessors.
    store = dist.PrefixStore(f"attempt {attempt()}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks)
    try:
        yield
        dist.destroy_process_group()
    except (GptpipeError, RuntimeError) as error:
        is_of_group = isinstance(error, GptpipeError | dist.DistError) or "gloo" in str(error)
        if not is_of_group:
            raise
        _leave(store, rank, error)


def _leave(store: Any, rank: int, error: Exception) -> NoReturn:
    """End this rank after an error. Exactly one rank raises it; the others raise SystemExit."""
    lost = ResourceError(f"train: rank {rank} lost another rank; rerun to continue from the last checkpoint")
    fault = error if isinstance(error, GptpipeError) else lost
    # torchrun sends it when the first rank ends, and this one is ending.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    n_reports = 1
    with suppress(RuntimeError):  # torchrun, which keeps the store, may be gone
        if rank == 0:
            store.set("rank 0 left", "")
        elif isinstance(fault, Interrupted | NumericError):
            # All ranks raise these, and rank 0 still has to save.
            store.wait(["rank 0 left"], timedelta(seconds=60))
        n_reports = store.add("errors reported", 1)
    if n_reports > 1:
        raise SystemExit(fault.exit_code) from error
    console.quiet = False
    raise fault from error


def is_writer() -> bool:
    """Whether this rank writes to the disk, the record and the console."""
    return rank_info().rank == 0


def from_first(value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if rank_info().n_ranks > 1:
        dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait until all ranks have come this far."""
    from_first(None)


def all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum of all ranks' tensors, or another operation on them, in place."""
    if rank_info().n_ranks > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def batch_slice(params: TrainParams) -> slice:
    """This rank's sequences of a batch.

    Raises ConfigError unless all ranks get equal numbers of micro-batches.
    """
    rank, n_ranks = rank_info()[:2]
    size = params.micro_batch_size or 1
    if params.batch_size % (n_ranks * size):
        raise ConfigError(
            f"train.batch_size {params.batch_size} must be a multiple of "
            f"{n_ranks} processes (train.launcher) x {size} sequences (train.micro_batch_size)"
        )
    n = params.batch_size // n_ranks
    return slice(rank * n, (rank + 1) * n)


def shard(model: GPT) -> None:
    """Split weights, gradients and optimizer state over ranks (FSDP: Zhao et al., 2023, arXiv:2304.11277)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.embedding.weight.device.type, (rank_info().n_ranks,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "loss")


def unsharded(model: GPT) -> GPT:
    """The model with all its weights, for everything but training.

    A sharded one is copied; all ranks must call.
    """
    if not is_sharded(model.embedding.weight):
        return model
    with torch.random.fork_rng(devices=[]), model.embedding.weight.device:
        copy = GPT(model.params, model.vocab_size)
    for name, parameter in model.named_parameters():
        copy.get_parameter(name).data.copy_(gather(parameter.detach()))
    return copy


def averaging(model: GPT, loss: LossFunction) -> LossFunction:
    """The loss; its gradients are averaged over the ranks (DDP: Li et al., 2020, arXiv:2006.15704)."""
    if rank_info().n_ranks == 1 or is_sharded(model.embedding.weight):
        return loss
    module = nn.Module()
    module.model, module.forward = model, loss
    averaged = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    averaged.broadcast_buffers = False  # the rotary tables are the same on all ranks
    return averaged


def fitting_on_all_ranks(
    model: GPT, loss: LossFunction, precision: torch.dtype, micro_batch_size: int, *, n_own: int, n_spare: int
) -> int:
    """The micro-batch size, halved until every rank has memory for one pass and `n_spare` bytes beside it.

    A rank that runs out of memory within a step would leave the others waiting, so this is tried before the
    first one. `n_own` is a rank's number of sequences in a batch. Tries nothing with one process, and nothing
    with FSDP, whose ranks need each other within the pass. Raises ResourceError if a single sequence does not
    fit.
    """
    while isinstance(loss, nn.parallel.DistributedDataParallel):
        with loss.no_sync():
            is_short = not _fits(model, loss, precision, micro_batch_size, n_spare)
        model.zero_grad(set_to_none=True)
        # Not on the device, which may be full.
        if not all_reduce(torch.tensor(int(is_short)), dist.ReduceOp.MAX):
            break
        micro_batch_size = halved(micro_batch_size, n_own)
    return micro_batch_size


def _fits(model: GPT, loss: LossFunction, precision: torch.dtype, n_sequences: int, n_spare: int) -> bool:
    """Whether one pass of `n_sequences` and `n_spare` bytes fit into memory."""
    try:
        spare = torch.empty(n_spare, dtype=torch.uint8, device=model.embedding.weight.device)
        _run_pass(model, loss, precision, n_sequences)
        del spare
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def warm_up(model: GPT, loss: LossFunction, precision: torch.dtype, micro_batch_size: int) -> None:
    """Run one pass of DDP: its first pass sums in another order, so a resumed training would differ."""
    if isinstance(loss, nn.parallel.DistributedDataParallel):
        _run_pass(model, loss, precision, micro_batch_size)
        model.zero_grad(set_to_none=True)


def _run_pass(model: GPT, loss: LossFunction, precision: torch.dtype, n_sequences: int) -> None:
    """Forward and backward on (n_sequences, T) zeros."""
    tokens = model.embedding.weight.new_zeros((n_sequences, model.params.context_length), dtype=torch.int64)
    with autocast(tokens.device, precision):
        mean_nats = loss(tokens, tokens)
    mean_nats.backward()  # type: ignore[no-untyped-call]

"""Training by several processes, as torchrun starts them: every rank runs the same program on its part of each batch.

With one process all of this does nothing. Rank 0 alone writes: to the disk, the record and the console.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from gptpipe.model.device import autocast, gather, is_out_of_memory, is_sharded
from gptpipe.model.gpt import GPT
from gptpipe.shell.console import complain, console
from gptpipe.shell.environment import attempt, place
from gptpipe.shell.errors import ConfigError, GptpipeError, Interrupted, NumericError, ResourceError
from gptpipe.train.params import TrainParams

T = TypeVar("T")
LossFunction = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def together() -> Iterator[None]:
    """Join the other ranks. What ends one ends all, as ResourceError: one says why, others raise SystemExit."""
    here = place()
    if here.n_ranks == 1:
        yield
        return
    store, _, _ = next(rendezvous("env://"))
    # torchrun keeps the store when it starts ranks again: without a part of their own they would meet those of before.
    store = dist.PrefixStore(f"attempt {attempt()}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.n_ranks)
    try:
        yield
        dist.destroy_process_group()
    except (GptpipeError, RuntimeError) as error:
        if not isinstance(error, GptpipeError | dist.DistError) and "gloo" not in str(error):
            raise
        lost = ResourceError(f"train: rank {here.rank} lost another rank; rerun to go on from the last checkpoint")
        fault = error if isinstance(error, GptpipeError) else lost
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when the first rank ends; we are leaving
        n_told = 1
        with suppress(RuntimeError):  # torchrun, which keeps the store, may be gone
            if here.rank == 0:
                store.set("rank 0 left", "")
            elif isinstance(fault, Interrupted | NumericError):  # all ranks at once, and rank 0 has yet to save
                store.wait(["rank 0 left"], timedelta(seconds=60))
            n_told = store.add("faults told", 1)
        if n_told > 1:
            raise SystemExit(fault.exit_code) from error
        console.quiet = False
        raise fault from error


def from_first(value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if place().n_ranks > 1:
        dist.broadcast_object_list(box)
    return box[0]


def all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum of all ranks' tensors, or another operation on them, in place."""
    if place().n_ranks > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def share(params: TrainParams) -> slice:
    """This rank's sequences of a batch. Raises ConfigError where the ranks' shares are not equal micro-batches."""
    here, size = place(), params.micro_batch_size or 1
    if params.batch_size % (here.n_ranks * size):
        raise ConfigError(
            f"train.batch_size {params.batch_size} must be a multiple of {here.n_ranks} processes (train.launcher) x "
            f"{size} sequences (train.micro_batch_size)"
        )
    n = params.batch_size // here.n_ranks
    return slice(here.rank * n, (here.rank + 1) * n)


def shard(model: GPT) -> None:
    """Split weights, gradients and optimizer state over the ranks (FSDP: Zhao et al., 2023, arXiv:2304.11277)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.embedding.weight.device.type, (place().n_ranks,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "loss")


def whole_model(model: GPT) -> GPT:
    """The model with all its weights, for all but training; a sharded one is copied, and all ranks must ask."""
    if not is_sharded(model.embedding.weight):
        return model
    with torch.random.fork_rng(devices=[]), model.embedding.weight.device:
        copy = GPT(model.params, model.vocab_size)
    for name, parameter in model.named_parameters():
        copy.get_parameter(name).data.copy_(gather(parameter.detach()))
    return copy


def averaging(model: GPT, loss: LossFunction) -> LossFunction:
    """The loss, with gradients averaged over the ranks as they are made (DDP: Li et al., 2020, arXiv:2006.15704)."""
    if place().n_ranks == 1 or is_sharded(model.embedding.weight):
        return loss
    module = nn.Module()
    module.model, module.forward = model, loss
    averaged = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    averaged.broadcast_buffers = False  # the rotary tables are alike everywhere
    return averaged


def fitting_all(
    model: GPT, loss: LossFunction, precision: torch.dtype, micro_batch_size: int, *, n_own: int, n_spare: int
) -> int:
    """The micro-batch size, halved until every rank has memory for a pass and `n_spare` bytes beside it.

    For the start: a rank that runs out within a step would leave the others waiting. `n_own` are a rank's sequences of
    a batch. With one process, or by FSDP, whose ranks need each other within the pass, nothing is tried. Raises
    ResourceError.
    """
    while isinstance(loss, nn.parallel.DistributedDataParallel):
        with loss.no_sync():
            is_short = not _fits(model, loss, precision, micro_batch_size, n_spare)
        model.zero_grad(set_to_none=True)
        if not all_reduce(torch.tensor(int(is_short)), dist.ReduceOp.MAX):  # not on the device, which may be full
            break
        micro_batch_size = halved(micro_batch_size, n_own)
    return micro_batch_size


def _fits(model: GPT, loss: LossFunction, precision: torch.dtype, n_sequences: int, n_spare: int) -> bool:
    try:
        spare = torch.empty(n_spare, dtype=torch.uint8, device=model.embedding.weight.device)
        _pass(model, loss, precision, n_sequences)
        del spare
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def settle(model: GPT, loss: LossFunction, precision: torch.dtype, micro_batch_size: int) -> None:
    """Run a pass with DDP: after its first it sums in another order, and a resumed training would differ."""
    if isinstance(loss, nn.parallel.DistributedDataParallel):
        _pass(model, loss, precision, micro_batch_size)
        model.zero_grad(set_to_none=True)


def _pass(model: GPT, loss: LossFunction, precision: torch.dtype, n_sequences: int) -> None:
    tokens = model.embedding.weight.new_zeros((n_sequences, model.params.context_length), dtype=torch.int64)
    with autocast(tokens.device, precision):
        nats = loss(tokens, tokens)
    nats.backward()  # type: ignore[no-untyped-call]


def halved(micro_batch_size: int, n_sequences: int) -> int:
    """The largest size up to half of it that divides `n_sequences`. Raises ResourceError for a single sequence."""
    if micro_batch_size == 1:
        raise ResourceError(
            "train: out of memory with single sequences; lower the model's size or model.context_length, or set "
            "train.activation_checkpointing to true"
        )
    size = next(n for n in range(micro_batch_size // 2, 0, -1) if n_sequences % n == 0)
    complain(f"warning: out of memory; going on with micro-batches of {size}")
    return size

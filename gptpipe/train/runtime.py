"""Where and how a training computes: device, precision, compiler, and what must be the same to resume bit for bit."""

import hashlib
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from gptpipe import __version__
from gptpipe.base.code import code_digest
from gptpipe.model.cpu_kernels import LinearCrossEntropy
from gptpipe.model.device import available_memory, best_device, is_sharded
from gptpipe.model.gpt import GPT
from gptpipe.model.params import ModelParams
from gptpipe.shell.environment import place
from gptpipe.shell.errors import ConfigError, Interrupted, ResourceError
from gptpipe.train import distributed
from gptpipe.train.params import TrainParams

# FLOPs from which compiling pays: of each thread of a CPU at 3e10 in a second, of a GPU at 1e14 (not measured).
_HALF_AN_HOUR, _MINUTES_OF_A_GPU = 1800 * 3e10, 180 * 1e14


@dataclass(frozen=True)
class Runtime:
    """The resolved `auto` values."""

    device: torch.device
    precision: torch.dtype
    compiles: bool
    ranks: str

    def describe(self) -> dict[str, str | int | bool]:
        """What the bits of a result depend on, beside parameters and data."""
        is_cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if is_cuda else self.device.type,
            "precision": str(self.precision).removeprefix("torch."),
            "compiled": self.compiles,
            "gptpipe": __version__,
            "torch": torch.__version__,
            "ranks": self.ranks,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "arithmetic": _arithmetic(self.device),
            "training_code": code_digest("train")[:16],
        }

    @property
    def holds_all_logits(self) -> bool:
        """Whether a step has the logits of all its tokens in memory, not of some rows at a time: see `GPT.loss`."""
        return self.compiles or self.device.type != "cpu" or self.precision != torch.float32


def _arithmetic(device: torch.device) -> str:
    """Digest of a product and some functions of fixed numbers: libraries choose their code by the processor, and by
    settings of their own, such as MKL_CBWR."""
    x = torch.arange(96 * 160, dtype=torch.float32).reshape(96, 160).sin().to(device)
    return _digest(((x @ x.mT).softmax(-1) @ x).cpu().numpy().tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def resolve(params: TrainParams, flops: float, model: ModelParams) -> Runtime:
    """Turn `auto` into what this machine has and a training of this model by so many FLOPs needs.

    Raises ConfigError for a device or a compiler that is not there.
    """
    try:
        device = best_device() if params.device == "auto" else torch.device(params.device)
        if device.type == "cuda" and place().n_ranks > 1:
            device = torch.device("cuda", place().local_rank)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"train.device: {params.device!r} is not to be had here; set it to auto or cpu") from error
    precision = params.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    ranks = "1" if place().n_ranks == 1 else f"{place().n_ranks} by {params.parallel}"
    compiles = _compiling_pays(params, device, flops, model) if params.compile == "auto" else params.compile
    if compiles and device.type == "cpu" and not _has_compiler():
        raise ConfigError("train.compile: true needs a C++ compiler on a CPU; install g++, or set it to auto")
    return Runtime(device, getattr(torch, precision), compiles, ranks)


def _compiling_pays(params: TrainParams, device: torch.device, flops: float, model: ModelParams) -> bool:
    """Whether compiling, about a minute, is short beside what it saves.

    On a CPU a twelfth of the steps' time or more, but nothing of GPT-2's, whose eager kernels are as fast.
    """
    if place().n_ranks > 1 and (device.type == "cpu" or params.parallel == "fsdp"):  # never tried
        return False
    match device.type:
        case "cpu":
            return _has_compiler() and model.architecture != "gpt2" and flops > _HALF_AN_HOUR * torch.get_num_threads()
        case "cuda":
            return flops > _MINUTES_OF_A_GPU
    return False


def _has_compiler() -> bool:
    return any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]))


def be_deterministic() -> None:
    """Same parameters, data and machine kind give the same bits; an operation that cannot is an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling all new memory with NaN costs time at every step, to guard reads of unwritten memory that we do not make.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def loss_function(model: GPT, params: TrainParams, end_of_text: int, *, compiles: bool) -> distributed.LossFunction:
    """The model's loss of (B, T) tokens and targets as `params` want it, compiled or not."""
    document_end = end_of_text if params.document_masking else None
    loss: distributed.LossFunction = partial(model.loss, z_loss=params.z_loss, end_of_text=document_end)
    return torch.compile(loss, dynamic=False) if compiles else loss


def estimated_bytes(model: GPT, sequences: int, *, holds_all_logits: bool) -> int:
    """About the memory of training: weights, gradients and optimizer state; activations of `sequences` at once.

    Activations after Korthikanti et al., 2022 (arXiv:2205.05198, section 4.1), with attention that keeps no T x T
    matrix; all in float32.
    """
    params = model.params
    per_block = 2 * params.n_embd if model.activation_checkpointing else 12 * params.n_embd + 5 * params.n_inner
    tokens = sequences * params.context_length
    logits = (tokens if holds_all_logits else min(tokens, LinearCrossEntropy.ROWS)) * 3 * model.vocab_size
    held = sum(p.to_local().numel() if is_sharded(p) else p.numel() for p in model.parameters())  # type: ignore[attr-defined, misc]
    return 4 * (4 * held + tokens * params.n_layer * per_block + logits)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device for this process."""
    return available_memory(device) // (1 if device.type == "cuda" else place().n_local_ranks)


def micro_batch_size(params: TrainParams, model: GPT, free: int, *, holds_all_logits: bool) -> int:
    """`train.micro_batch_size`, or the largest divisor of the batch whose estimate fits nine tenths of `free` bytes.

    Raises ResourceError, before the first step, where nothing fits.
    """
    divisors = [n for n in range(params.batch_size, 0, -1) if params.batch_size % n == 0]
    candidates = divisors if params.micro_batch_size is None else [params.micro_batch_size]
    for candidate in candidates:
        needed = estimated_bytes(model, candidate, holds_all_logits=holds_all_logits)
        if needed < 0.9 * free:
            return candidate
    raise ResourceError(
        f"train: micro-batches of {candidates[-1]} need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free; "
        "lower train.micro_batch_size or the model, or set train.activation_checkpointing to true"
    )


@contextmanager
def noted_signals() -> Iterator[Callable[[], None]]:
    """Gives a check that raises Interrupted once SIGINT or SIGTERM came, to this rank or to another.

    The second signal ends the process at once.
    """
    came: list[int] = []

    def note(signum: int, _: object) -> None:
        if came:
            os._exit(128 + signum)
        came.append(signum)

    def check() -> None:
        if signum := int(distributed.all_reduce(torch.tensor(max(came, default=0)), torch.distributed.ReduceOp.MAX)):
            raise Interrupted(signum, "train: stopped, all saved; rerun to go on from there")

    is_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield check
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

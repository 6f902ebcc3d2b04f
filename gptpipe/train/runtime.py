"""Where and how a training computes: device, precision, compiler, and what a bit-exact resume depends on."""

import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from functools import partial

import torch

from gptpipe import __version__
from gptpipe.base.code import code_digest
from gptpipe.model.device import best_device
from gptpipe.model.gpt import GPT
from gptpipe.model.params import ModelParams
from gptpipe.shell.environment import rank_info
from gptpipe.shell.errors import ConfigError
from gptpipe.train.distributed import LossFunction
from gptpipe.train.params import TrainParams

# Compiling takes about a minute. It pays off from this much work: half an hour of each CPU thread at 3e10
# FLOP/s, or three minutes of a GPU at 1e14 FLOP/s (not measured).
_CPU_THREAD_FLOPS, _GPU_FLOPS = 1800 * 3e10, 180 * 1e14


@dataclass(frozen=True)
class Runtime:
    """The resolved `auto` values."""

    device: torch.device
    precision: torch.dtype
    is_compiled: bool
    ranks: str  # their number, and how they share the work

    def describe(self) -> dict[str, str | int | bool]:
        """Everything besides parameters and data that the bits of a result depend on."""
        is_cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if is_cuda else self.device.type,
            "precision": str(self.precision).removeprefix("torch."),
            "compiled": self.is_compiled,
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
        """Whether a step holds the logits of all its tokens at once, not of some rows: see `GPT.loss`."""
        return self.is_compiled or self.device.type != "cpu" or self.precision != torch.float32


def _arithmetic(device: torch.device) -> str:
    """Digest of a matrix product and some functions of fixed numbers.

    Libraries choose their kernels by the processor, and by their own settings such as MKL_CBWR.
    """
    x = torch.arange(96 * 160, dtype=torch.float32).reshape(96, 160).sin().to(device)
    result = ((x @ x.mT).softmax(-1) @ x).cpu().numpy()
    return hashlib.sha256(result.tobytes()).hexdigest()[:16]


def resolve_runtime(params: TrainParams, flops: float, model: ModelParams) -> Runtime:
    """Choose a value for each `auto`, by this machine and by the FLOPs that the training takes.

    Raises ConfigError for a device or a compiler that is not available.
    """
    try:
        device = best_device() if params.device == "auto" else torch.device(params.device)
        if device.type == "cuda" and rank_info().n_ranks > 1:
            device = torch.device("cuda", rank_info().local_rank)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"train.device: {params.device!r} is not available on this machine; set it to auto or cpu"
        ) from error
    precision = params.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    n_ranks = rank_info().n_ranks
    ranks = "1" if n_ranks == 1 else f"{n_ranks} by {params.parallel}"
    is_compiled = (
        _compiling_pays_off(params, device, flops, model) if params.compile == "auto" else params.compile
    )
    if is_compiled and device.type == "cpu" and not _has_compiler():
        raise ConfigError("train.compile: true needs a C++ compiler on a CPU; install g++, or set it to auto")
    return Runtime(device, getattr(torch, precision), is_compiled, ranks)


def _compiling_pays_off(params: TrainParams, device: torch.device, flops: float, model: ModelParams) -> bool:
    """Whether compiling takes less time than it saves.

    On a CPU it saves a twelfth of the steps' time or more, but nothing for GPT-2, whose eager kernels are as
    fast.
    """
    if rank_info().n_ranks > 1 and (device.type == "cpu" or params.parallel == "fsdp"):  # never tried
        return False
    match device.type:
        case "cpu":
            is_long = flops > _CPU_THREAD_FLOPS * torch.get_num_threads()
            return is_long and model.architecture != "gpt2" and _has_compiler()
        case "cuda":
            return flops > _GPU_FLOPS
    return False


def _has_compiler() -> bool:
    return any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]))


def be_deterministic() -> None:
    """Make equal parameters, data and machines give equal bits.

    An operation that cannot do so raises an error.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It fills new memory with NaN at every step, to reveal reads of unwritten memory. Training makes none.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def loss_function(model: GPT, params: TrainParams, end_of_text: int, *, is_compiled: bool) -> LossFunction:
    """The model's loss of (B, T) tokens and (B, T) targets, with the options of `params`."""
    document_end = end_of_text if params.document_masking else None
    loss: LossFunction = partial(model.loss, z_loss=params.z_loss, end_of_text=document_end)
    return torch.compile(loss, dynamic=False) if is_compiled else loss

"""Where and how a training computes: device, precision, compiler, and what must be the same to resume bit for bit."""

import os
import platform
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType

import psutil
import torch

from gptpipe.config import ModelParams, TrainParams
from gptpipe.errors import ConfigError, ResourceError
from gptpipe.model.device import best_device


@dataclass(frozen=True)
class Runtime:
    """The resolved `auto` values."""

    device: torch.device
    precision: torch.dtype
    compiles: bool

    def describe(self) -> dict[str, str | int | bool]:
        """What the bits of a result depend on, beside parameters and data."""
        is_cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if is_cuda else self.device.type,
            "precision": str(self.precision).removeprefix("torch."),
            "compiled": self.compiles,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
        }


def resolve(params: TrainParams) -> Runtime:
    """Turn `auto` into what this machine has. Raises ConfigError for a device that is not there."""
    try:
        device = best_device() if params.device == "auto" else torch.device(params.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"train.device: {params.device!r} is not to be had here; set it to auto or cpu") from error
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    precision = {"auto": torch.bfloat16 if has_bfloat16 else torch.float32}.get(params.precision)
    precision = precision or getattr(torch, params.precision)
    # On a CPU, compiling costs about a minute and gains an eighth of the step time: only on request.
    compiles = device.type == "cuda" if params.compile == "auto" else params.compile
    return Runtime(device, precision, compiles)


def be_deterministic() -> None:
    """Same parameters, data and machine kind give the same bits; an operation that cannot is an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def estimated_bytes(model: ModelParams, vocab_size: int, n_parameters: int, sequences: int, checkpointing: bool) -> int:
    """About the memory of training: weights, gradients and optimizer state; activations of `sequences` at once.

    Activations after Korthikanti et al., 2022 (arXiv:2205.05198, section 4.1), with attention that keeps no T x T
    matrix; all in float32.
    """
    per_token_block = 2 * model.n_embd if checkpointing else 12 * model.n_embd + 5 * model.n_inner
    per_token = model.n_layer * per_token_block + 3 * vocab_size
    return 4 * (4 * n_parameters + sequences * model.context_length * per_token)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def micro_batch_size(
    params: TrainParams, model: ModelParams, vocab_size: int, n_parameters: int, device: torch.device
) -> int:
    """`train.micro_batch_size`, or the largest divisor of the batch whose estimate fits nine tenths of free memory.

    Raises ResourceError, before the first step, where nothing fits.
    """
    divisors = [n for n in range(params.batch_size, 0, -1) if params.batch_size % n == 0]
    candidates = divisors if params.micro_batch_size is None else [params.micro_batch_size]
    free = free_bytes(device)
    needed = 0
    for candidate in candidates:
        needed = estimated_bytes(model, vocab_size, n_parameters, candidate, params.activation_checkpointing)
        if needed < 0.9 * free:
            return candidate
    raise ResourceError(
        f"train: micro-batches of {candidates[-1]} need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free "
        f"on {device}; lower train.micro_batch_size or the model, or set train.activation_checkpointing to true"
    )


@dataclass
class StopRequest:
    """SIGINT and SIGTERM ask the loop to stop after the step; the second signal ends the process at once."""

    signum: int | None = None
    _previous: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum

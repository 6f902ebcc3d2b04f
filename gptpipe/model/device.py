"""Where the network computes, how precisely, and with what memory."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

from gptpipe.shell.errors import ResourceError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


def best_device() -> torch.device:
    """The fastest kind of device that is there."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `precision`, everything that needs it in float32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, instead of giving it back to the system each time.

    A step frees and takes the same large blocks again, and each first touch of a new page is a fault: measured at a
    tenth of the default run's step. Does nothing where the C library has no such setting.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def available_memory(device: torch.device) -> int:
    """Bytes that this machine, or the accelerator, can still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left_to_cgroups()])


def _left_to_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What limits of a container or a batch system leave (Linux, version 2); what is only cached counts as free."""
    with suppress(OSError):
        folder = root / own.read_text().rpartition("::/")[2].strip()
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError, IndexError):  # no such file above the root; `max` is no limit
                cached = int((group / "memory.stat").read_text().partition("inactive_file ")[2].split()[0])
                yield int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + cached


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of an accelerator, or of the machine, for which torch has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Turn a failed allocation into a ResourceError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(message) from error


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold parts of the tensor. Without the import that names the class: it takes 2 s."""
    return hasattr(tensor, "full_tensor")


def gather(tensor: Tensor) -> Tensor:
    """The tensor with all its parts; every process that holds one must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor that every process has, moved to where `other` is, and split as it is if of its shape."""
    if not is_sharded(other) or tensor.shape != other.shape:
        return tensor.to(other.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)

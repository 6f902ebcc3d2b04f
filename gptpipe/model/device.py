"""The device that the network runs on: its precision, its memory, and tensors that are sharded over several."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

from gptpipe.shell.errors import ResourceError

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def best_device() -> torch.device:
    """The fastest kind of device that is available."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Compute matrix products in `precision`; torch keeps sensitive operations in float32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, instead of returning it to the system.

    Every step allocates and frees the same large blocks. If they are new to the process, the first access to
    each page is a page fault, which costs a tenth of the default run's step. Has no effect with other C
    libraries.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def available_memory(device: torch.device) -> int:
    """Free bytes of the device: of the accelerator, or of this machine and the container it runs in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_free_in_cgroups()])


def _free_in_cgroups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Free bytes within each memory limit of a container or batch system (cgroup version 2 of Linux).

    Cached files count as free.
    """
    with suppress(OSError):
        folder = root / own.read_text().rpartition("::/")[2].strip()
        for group in (folder, *folder.parents):
            # Above the root there are no such files; `max` is no limit.
            with suppress(OSError, ValueError, IndexError):
                cached = int((group / "memory.stat").read_text().partition("inactive_file ")[2].split()[0])
                used = int((group / "memory.current").read_text())
                yield int((group / "memory.max").read_text()) - used + cached


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on the accelerator or the CPU; for the CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_errors(message: Callable[[], str]) -> Iterator[None]:
    """Turn a failed allocation into a ResourceError. `message` is called at that moment."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(message()) from error


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold parts of the tensor.

    Importing DTensor for an isinstance check would take 2 s.
    """
    return hasattr(tensor, "full_tensor")


def gather(tensor: Tensor) -> Tensor:
    """The full tensor. If it is sharded, every process that holds a part must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Move a full tensor to the device of `other`, and shard it in the same way if the shapes are equal.

    Every process must have the full tensor.
    """
    if not is_sharded(other) or tensor.shape != other.shape:
        return tensor.to(other.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)

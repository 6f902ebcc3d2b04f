"""Where the network computes, and how precisely."""

from contextlib import AbstractContextManager, nullcontext

import torch


def best_device() -> torch.device:
    """The fastest kind of device that is there."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `precision`, everything that needs it in float32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)

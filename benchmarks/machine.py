"""Shared by the benchmarks: the machine's description and matrix-product rate, numbers with their spread."""

import platform
import statistics
import time
from collections.abc import Sequence

import torch


def describe() -> str:
    """Machine, threads and versions, as the line above a table."""
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    )
    return f"{platform.platform()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The mean, and with several values their standard deviation."""
    error = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{error}"


def matrix_product_rate(n: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of this processor: the best of several (n, n) float32 products."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best

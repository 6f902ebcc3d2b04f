"""Limits inside a worker: memory and its errors, and a standard error that is silent for a while."""

import os
import resource
import signal
import sys

import pytest

from gptpipe.base.limits import hidden_stderr, memory_limit, time_limit
from gptpipe.shell.errors import InputError, ResourceError


@pytest.mark.skipif(sys.platform != "linux", reason="the limit exists on Linux only")
def test_memory_is_limited_inside_the_block_only() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    message = r"^a\.parquet: needs more than 100 MiB of memory to read: it is damaged; replace it"
    with memory_limit("a.parquet", 100 << 20):
        assert len(bytes(50 << 20)) == 50 << 20
    with pytest.raises(InputError, match=message), memory_limit("a.parquet", 100 << 20):
        bytes(4 << 30)  # more than other tests have left free in this process
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytes(200 << 20)) == 200 << 20


def test_without_a_limit_too_little_memory_is_not_the_fault_of_the_file() -> None:
    message = r"^a\.parquet: not enough memory to read it; free memory"
    with pytest.raises(ResourceError, match=message), memory_limit("a.parquet", None):
        raise MemoryError


def test_a_time_limit_starts_again_when_it_is_called_and_ends_with_the_block() -> None:
    """That it ends a process is tested with `map_in_order`."""
    with time_limit(60) as start_again:
        signal.setitimer(signal.ITIMER_REAL, 30)
        start_again()
        assert 30 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_standard_error_is_hidden_inside_the_block_only(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"before ")
    with hidden_stderr():
        os.write(2, b"native noise ")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"

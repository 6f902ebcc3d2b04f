"""Limits for native code that reads files of unknown origin. Use them inside a worker process."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptpipe.shell.errors import GptpipeError, InputError, ResourceError


@contextmanager
def memory_limit(name: str, n_bytes: int | None) -> Iterator[None]:
    """Let the block allocate at most `n_bytes` more than the process has now; None sets no limit.

    The limit counts addresses (RLIMIT_AS) and exists on Linux only. A MemoryError inside becomes an InputError
    that says that the file `name` is damaged; without a limit, a ResourceError.
    """
    try:
        with _address_limit(n_bytes):
            yield
    except MemoryError as error:
        raise _memory_error(name, n_bytes) from error


def _memory_error(name: str, n_bytes: int | None) -> GptpipeError:
    if n_bytes is None:
        return ResourceError(f"{name}: not enough memory to read it; free memory, then rerun")
    return InputError(
        f"{name}: needs more than {n_bytes >> 20:,} MiB of memory to read: it is damaged; replace it"
    )


@contextmanager
def _address_limit(n_bytes: int | None) -> Iterator[None]:
    if sys.platform != "linux" or n_bytes is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    finite = [limit for limit in (soft, hard, used + n_bytes) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(finite), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], None]]:
    """End this process by SIGALRM if the block takes longer. Calling what is yielded starts the time again.

    Native code that hangs cannot be interrupted by an exception. `map_in_order` reports the end of the worker.
    """

    def start() -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    start()
    try:
        yield start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def hidden_stderr() -> Iterator[None]:
    """Discard what the process prints to its standard error: a native library that crashes prints there."""
    sys.stderr.flush()
    kept = os.dup(2)
    discard = os.open(os.devnull, os.O_WRONLY)
    os.dup2(discard, 2)
    os.close(discard)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def disable_core_dumps() -> None:
    """A core dump of a worker may fill the disk; the parent reports the crash."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

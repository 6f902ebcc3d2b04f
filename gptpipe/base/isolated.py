"""Run a generator in another process, so that native code which crashes on a hostile file does not end the stage."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeVar

from gptpipe.shell.errors import GptpipeError, InputError, ResourceError
from gptpipe.shell.process import end_worker_with_parent

_TIMEOUT = 300.0  # seconds without a result
_ARROW_POOL = "ARROW_DEFAULT_MEMORY_POOL"
Item = TypeVar("Item")


class OpenFile:
    """An open file as an argument of `isolated`. The child opens its own copy of the descriptor."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (reduction.DupFd(self._file.fileno()),)


def _reopen(descriptor: Any) -> BinaryIO:
    return open(descriptor.detach(), "rb")  # noqa: PTH123  a descriptor, not a path


def isolated(
    name: str, work: Callable[..., Iterator[Item]], *arguments: Any, memory: int | None = None
) -> Iterator[Item]:
    """Yield what the generator function `work` yields in a child process. `work` must be a function of a module.

    An error of `work` is raised here. Raises InputError that names `name` if the child crashes, needs more than
    `memory` bytes, or yields nothing for five minutes. The child reads ahead by at most the capacity of a pipe. It
    ends with this process, and when this generator is closed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    receiver, sender = context.Pipe(duplex=False)
    with receiver:
        with sender, _environment_of_children():
            child_arguments = (sender, dict(os.environ), name, memory, work, arguments)
            process = context.Process(target=_send_items, args=child_arguments, daemon=True)
            process.start()
        try:
            while receiver.poll(_TIMEOUT):
                try:
                    kind, value = receiver.recv()
                except (EOFError, OSError):
                    raise _error_of_exit(name, process) from None
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
            raise InputError(f"{name}: no data from its reader in {_TIMEOUT:.0f} s; replace the file")
        finally:
            process.kill()
            process.join()
            process.close()


def _error_of_exit(name: str, process: Any) -> GptpipeError:
    process.join()
    code = process.exitcode
    if code == -signal.SIGKILL:
        return ResourceError(f"{name}: its reader was killed; if memory is short, free some, then rerun")
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return InputError(f"{name}: its reader crashed ({cause}): the file is damaged; replace it")


def _send_items(
    sender: Connection,
    environment: dict[str, str],
    name: str,
    memory: int | None,
    work: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> None:
    """In the child: send each item as ("item", item), then ("end", None) or ("error", an exception)."""
    end_worker_with_parent()
    os.environ.clear()  # inherited from the fork server, so it may be out of date
    os.environ.update(environment)
    _limit_memory(memory)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crashing library prints there; the parent reports the crash
    last_message: tuple[str, Any] = ("end", None)
    try:
        for item in work(*arguments):
            sender.send(("item", item))
    except BrokenPipeError:  # the parent closed the generator
        return
    except GptpipeError as error:
        last_message = ("error", error)
    except MemoryError:
        last_message = ("error", _memory_error(name, memory))
    except Exception:
        last_message = ("error", RuntimeError(traceback.format_exc()))  # a bug of this project
    with suppress(BrokenPipeError):
        sender.send(last_message)


def _memory_error(name: str, memory: int | None) -> GptpipeError:
    if memory is None:
        return ResourceError(f"{name}: not enough memory to read it; free memory, then rerun")
    return InputError(f"{name}: needs more than {memory >> 20:,} MiB of memory to read: it is damaged; replace it")


def _limit_memory(memory: int | None) -> None:
    """Limit the memory that this process can still allocate to `memory` bytes, and disable core dumps."""
    if sys.platform != "linux":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + memory
        if hard >= 0:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@contextmanager
def _environment_of_children() -> Iterator[None]:
    """Change this process while it starts the fork server and a child, which inherit the changes.

    SIGINT is blocked: Ctrl-C reaches this process, which ends its children. The main module is replaced by an empty
    one, because children would run a script again that has no `if __name__ == "__main__"`. Arrow uses the system's
    allocator, because its own reserves 1 GiB of addresses, more than `_limit_memory` may allow.
    """
    main_module = sys.modules["__main__"]
    arrow_pool = os.environ.get(_ARROW_POOL)
    signal_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ[_ARROW_POOL] = "system"
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module
        del os.environ[_ARROW_POOL]
        if arrow_pool is not None:
            os.environ[_ARROW_POOL] = arrow_pool
        signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask)

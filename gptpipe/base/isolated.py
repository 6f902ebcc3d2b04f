"""Run a generator in another process, so that native code which crashes on a hostile file does not end the stage."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, BinaryIO, TypeVar

from gptpipe.base.limits import disable_core_dumps, hidden_stderr, memory_limit
from gptpipe.base.workers import death_in_parser, environment_of_workers, set_environment
from gptpipe.shell.errors import GptpipeError, InputError
from gptpipe.shell.process import end_worker_with_parent

_TIMEOUT = 300.0  # seconds without a result
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
        with sender, environment_of_workers():
            child_arguments = (sender, dict(os.environ), name, memory, work, arguments)
            process = context.Process(target=_send_items, args=child_arguments, daemon=True)
            process.start()
        try:
            while receiver.poll(_TIMEOUT):
                try:
                    kind, value = receiver.recv()
                except (EOFError, OSError):
                    process.join()
                    raise death_in_parser(name, process.exitcode or 0) from None
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
    set_environment(environment)
    disable_core_dumps()
    last_message: tuple[str, Any] = ("end", None)
    try:
        with hidden_stderr(), memory_limit(name, memory):
            for item in work(*arguments):
                sender.send(("item", item))
    except BrokenPipeError:  # the parent closed the generator
        return
    except GptpipeError as error:
        last_message = ("error", error)
    except Exception:
        last_message = ("error", RuntimeError(traceback.format_exc()))  # a bug of this project
    with suppress(BrokenPipeError):
        sender.send(last_message)

"""Worker processes of this machine.

The parent knows which item a worker has, so it can name the item of a crash. A worker is forked from a server
process that has already imported what the parent has, so it starts in milliseconds.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any, Generic, TypeVar

from gptpipe.base.limits import disable_core_dumps
from gptpipe.shell.errors import GptpipeError, InputError, ResourceError, first_line
from gptpipe.shell.process import end_worker_with_parent

# Arrow's own allocators reserve 1 GiB of addresses, more than `memory_limit` may allow. A worker is one of
# many, so its libraries use one thread.
_VARIABLES_OF_WORKERS = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDied(Exception):
    """A worker process ended while it had an item. `exit_code` is negative for a signal."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class _TracebackOfWorker(Exception):
    """The cause of an error that was raised in a worker: its traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Worker(Generic[Item, Result]):
    """Calls `work` in a process, with one item after another. It must be picklable, and not of `__main__`."""

    def __init__(self, work: Callable[[Item], Result]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_modules_to_import(work))
        self._connection, connection_of_worker = context.Pipe()
        self._is_busy = False
        try:
            with connection_of_worker, environment_of_workers():
                arguments = (connection_of_worker, dict(os.environ), work)
                self._process = context.Process(target=_serve, args=arguments, daemon=True)
                self._process.start()
        except OSError as error:
            reason = first_line(error)
            raise ResourceError(f"cannot start a worker process: {reason}; lower GPTPIPE_WORKERS") from error

    def ask(self, item: Item) -> Result:
        """The result of `work`. Raises its error, or WorkerDied. Any thread may call it, one at a time."""
        self._is_busy = True
        try:
            self._connection.send(item)
            result, error, trace = self._connection.recv()
            self._is_busy = False
        except (EOFError, ConnectionError):
            self._process.join()
            raise WorkerDied(self._process.exitcode or 0) from None
        if error is not None:
            raise error from _TracebackOfWorker(trace)
        answer: Result = result
        return answer

    def stop(self) -> None:
        """End the process now, also in the middle of an item. A thread that waits in `ask` gets WorkerDied."""
        if self._is_busy:
            self._process.kill()
        else:
            self._connection.close()  # the process ends by itself, so that its libraries can clean up

    def close(self) -> None:
        """Wait for the end of the stopped process. No thread may be in `ask`."""
        self._process.join()
        self._process.close()
        self._connection.close()


def death_in_work(name: str, exit_code: int) -> GptpipeError:
    """The error for a worker that ended at the item `name`, in code of this project."""
    if exit_code == -signal.SIGKILL:
        return ResourceError(
            f"a worker process was killed at {name}; if memory is short, lower GPTPIPE_WORKERS"
        )
    return ResourceError(
        f"a worker process ended at {name} ({_cause(exit_code)}); rerun, and report it if it recurs"
    )


def death_in_parser(name: str, exit_code: int) -> GptpipeError:
    """The error for a worker that ended while native code parsed the foreign file `name`."""
    if exit_code == -signal.SIGKILL:
        return ResourceError(f"{name}: its reader was killed; if memory is short, free some, then rerun")
    if exit_code == -signal.SIGALRM:
        return InputError(f"{name}: its reader does not progress: the file is damaged; replace it")
    return InputError(f"{name}: its reader crashed ({_cause(exit_code)}): the file is damaged; replace it")


def _cause(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def _modules_to_import(work: Callable[..., Any]) -> list[str]:
    """What the server process imports before it forks.

    The module of `work`, and what this process has imported. Not what a training has imported: torch takes
    seconds, and its threads do not survive a fork.
    """
    while isinstance(work, partial):
        work = work.func
    names = {work.__module__}
    if "torch" not in sys.modules:
        names |= {name for name in sys.modules if name.startswith("gptpipe.")}
    return sorted(names)


@contextmanager
def environment_of_workers() -> Iterator[None]:
    """Change this process while it starts the server process and a worker, which inherit the changes.

    SIGINT is blocked: Ctrl-C reaches this process, which ends its workers. The main module is replaced by an
    empty one, because workers would run a script again that has no `if __name__ == "__main__"`.
    """
    main_module = sys.modules["__main__"]
    changed = {name: os.environ.get(name) for name in _VARIABLES_OF_WORKERS}
    signal_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.update(_VARIABLES_OF_WORKERS)
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module
        for name, value in changed.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask)


def set_environment(variables: dict[str, str]) -> None:
    """In a worker: the server process may have been started with other variables than the parent has now."""
    os.environ.clear()
    os.environ.update(variables)


def _serve(connection: Connection, environment: dict[str, str], work: Callable[[Any], Any]) -> None:
    """In the worker: answer items until the parent closes the connection."""
    end_worker_with_parent()
    set_environment(environment)
    disable_core_dumps()
    with suppress(EOFError, ConnectionError):
        while True:
            item = connection.recv()
            connection.send_bytes(_answer(work, item))


def _answer(work: Callable[[Any], Any], item: Any) -> Any:
    """Pickle of (result, None, "") or of (None, an error, its traceback)."""
    try:
        return ForkingPickler.dumps((work(item), None, ""))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            content = pickle.dumps((None, error, trace))
            pickle.loads(content)
        except Exception:  # a class of errors that cannot be pickled, or cannot be restored
            content = pickle.dumps((None, RuntimeError(trace), trace))
        return content

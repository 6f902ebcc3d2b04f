"""One ordered map over shards, on all cores or on all machines of a Ray cluster; and generators in another process."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain, islice
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeVar

from gptpipe.shell.environment import n_workers, uses_ray
from gptpipe.shell.errors import GptpipeError, InputError, ResourceError, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], *, threads: bool = False) -> Iterator[Result]:
    """Results in the order of the items, whatever the number of workers; at most two items per worker wait.

    Workers are processes, or threads for work that leaves Python's lock to others most of the time. An error of a
    worker is raised here, ResourceError where a process dies. For processes `work` must be picklable: a function of a
    module, or a partial of one. With GPTPIPE_ENGINE=ray the workers are those of a Ray cluster.
    """
    rest = iter(items)
    first = list(islice(rest, n_workers()))  # more workers than items would be idle
    workers, items = len(first), chain(first, rest)
    if first and uses_ray():
        yield from _on_ray(work, items)
        return
    if len(first) <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) if threads else _processes(workers) as pool:
        try:
            yield from _ordered(lambda item: pool.submit(work, item), items, 2 * workers)
        except BrokenProcessPool as error:
            raise ResourceError("a worker process was killed; if memory is short, lower GPTPIPE_WORKERS") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ordered(start: Callable[[Item], Future[Result]], items: Iterable[Item], most_waiting: int) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(start(item))
        while waiting and (waiting[0].done() or len(waiting) > most_waiting):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _on_ray(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The same on the Ray cluster of RAY_ADDRESS, or on one started here; a task whose worker is lost is tried again.

    Every machine needs gptpipe, and the project's folder under the same path.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ResourceError("GPTPIPE_ENGINE=ray needs `ray`: pip install -e '.[cluster]'") from error
    if is_ours := not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        host, _, port = address.rpartition("/")[2].rpartition(":")
        try:
            if port.isdecimal():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            here = {} if address else {"num_cpus": n_workers()}
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False, **here)
        except (OSError, RuntimeError, ValueError) as error:
            raise ResourceError(
                f"no Ray cluster at {address or 'hand'}: {first_line(error)}; mend RAY_ADDRESS"
            ) from error
    try:
        task, shared = ray.remote(max_retries=3)(_work_in), ray.put(work)
        most = 2 * int(ray.cluster_resources().get("CPU", 1))
        yield from _ordered(lambda item: task.remote(Path.cwd(), shared, item).future(), items, most)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ResourceError(f"a Ray task was lost: {first_line(error)}; look at the cluster, then rerun") from error
    finally:
        if is_ours:
            ray.shutdown()


def _work_in(folder: Path, work: Callable[[Item], Result], item: Item) -> Result:
    os.chdir(folder)  # of the project: paths are relative to it
    return work(item)


def _processes(n: int) -> Executor:
    """Spawned, not forked: a fork would copy the locks of the parent's threads."""
    return ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), initializer=_follow_parent)


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent ends, however that comes about."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


_SILENCE = 300.0  # seconds without a result, then `in_child` gives up
_POOL = "ARROW_DEFAULT_MEMORY_POOL"


class OpenFile:
    """An open file as an argument of `in_child`. The child gets a file of its own with the same content."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (reduction.DupFd(self._file.fileno()),)


def _reopen(descriptor: Any) -> BinaryIO:
    return open(descriptor.detach(), "rb")  # noqa: PTH123  a descriptor, not a path


def in_child(
    name: str, work: Callable[..., Iterator[Item]], *arguments: Any, memory: int | None = None
) -> Iterator[Item]:
    """Yield what the generator function `work` yields in another process: its native code may crash on hostile input.

    An error of `work` is raised here. Raises InputError that names `name` if the process crashes, asks for more than
    `memory` bytes, or yields nothing for five minutes. The process reads ahead by at most what a pipe holds. It ends
    with this process, and when this generator is closed. `work` must be a function of a module.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    receiver, sender = context.Pipe(duplex=False)
    with receiver:
        with sender, _undisturbed():
            child_arguments = (sender, dict(os.environ), name, memory, work, arguments)
            process = context.Process(target=_produce, args=child_arguments, daemon=True)
            process.start()
        try:
            while receiver.poll(_SILENCE):
                try:
                    kind, value = receiver.recv()
                except (EOFError, OSError):
                    raise _crash(name, process) from None
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
            raise InputError(f"{name}: its reader has given nothing for {_SILENCE:.0f} s; replace the file")
        finally:
            process.kill()
            process.join()
            process.close()


def _crash(name: str, process: Any) -> GptpipeError:
    process.join()
    code = process.exitcode
    if code == -signal.SIGKILL:
        return ResourceError(f"{name}: its reader was killed; if memory is short, free some, then rerun")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return InputError(f"{name}: its reader crashed ({how}): the file is damaged; replace it")


def _produce(
    sender: Connection,
    environment: dict[str, str],
    name: str,
    memory: int | None,
    work: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> None:
    """In the child: send each result as ("item", result), then ("end", None) or ("error", an exception)."""
    _follow_parent()
    os.environ.clear()  # it is that of the time when the server of the children started
    os.environ.update(environment)
    _limit(memory)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crashing library writes there; the parent says it in one line
    message: tuple[str, Any] = ("end", None)
    try:
        for item in work(*arguments):
            sender.send(("item", item))
    except BrokenPipeError:  # the parent wants no more
        return
    except GptpipeError as error:
        message = "error", error
    except MemoryError:
        message = "error", _too_large(name, memory)
    except Exception:
        message = "error", RuntimeError(traceback.format_exc())  # a bug of ours
    with suppress(BrokenPipeError):
        sender.send(message)


def _too_large(name: str, memory: int | None) -> GptpipeError:
    if memory is None:
        return ResourceError(f"{name}: not enough memory to read it; free memory, then rerun")
    return InputError(f"{name}: needs more than {memory >> 20:,} MiB of memory to read: it is damaged; replace it")


def _limit(memory: int | None) -> None:
    """Let this process allocate only `memory` bytes more, and leave no core dump."""
    if sys.platform != "linux":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + memory
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Sets up the server that children are forked from, and each child.

    They never see Ctrl-C, since this process ends them. They do not import the main module, which would run a script
    again that has no `if __name__ == "__main__"`. Arrow's own allocator reserves 1 GiB of addresses, more than `_limit`
    may allow, so it takes the system's.
    """
    main, pool = sys.modules["__main__"], os.environ.get(_POOL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"], os.environ[_POOL] = ModuleType("__main__"), "system"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        del os.environ[_POOL]
        if pool is not None:
            os.environ[_POOL] = pool
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

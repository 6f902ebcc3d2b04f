"""One ordered map over shards, on all cores."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from gptpipe.environment import n_workers
from gptpipe.errors import ResourceError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Item], Result], items: Sequence[Item], *, threads: bool = False) -> Iterator[Result]:
    """Results in the order of the items, whatever the number of workers; at most two items per worker wait.

    Workers are processes, or threads for work that leaves Python's lock to others most of the time. An error of a
    worker is raised here, ResourceError where a process dies. For processes `work` must be picklable: a function of
    a module, or a partial of one.
    """
    workers = min(n_workers(), len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    with _threads(workers) if threads else _processes(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ResourceError("a worker process was killed; if memory is short, lower GPTPIPE_WORKERS") from error
        finally:
            for future in waiting:
                future.cancel()


def _threads(n: int) -> Executor:
    return ThreadPoolExecutor(n)


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

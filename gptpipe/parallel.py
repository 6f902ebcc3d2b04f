"""One ordered map over shards, on all cores."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from gptpipe.environment import n_workers

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Results in the order of the items, whatever the number of workers; at most two items per worker wait.

    An error of a worker is raised here. `work` must be picklable: a function of a module, or a partial of one.
    """
    workers = min(n_workers(), len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    # Spawned, not forked: a fork would copy the locks of the parent's threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

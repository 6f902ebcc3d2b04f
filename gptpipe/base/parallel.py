"""A parallel map with results in order: in processes or threads of this machine, or on a Ray cluster."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from gptpipe.base.ray_cluster import RayTasks
from gptpipe.base.workers import Worker, WorkerDied, death_in_parser, death_in_work
from gptpipe.shell.environment import n_workers, uses_ray
from gptpipe.shell.errors import GptpipeError

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]  # `map_in_order` with some of its options
Item = TypeVar("Item")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class _Pending(Protocol[Result_co]):
    """A result, now or later: a Future, or a task of Ray."""

    def done(self) -> bool: ...

    def result(self) -> Result_co: ...


def _shortened(item: object) -> str:
    return f"{item!s:.200}"


def map_in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: bool = False,
    small: bool = False,
    local: bool = False,
    isolate: bool = False,
    describe: Callable[[Item], str] = _shortened,
    parses: Callable[[Item], str] | None = None,
) -> Iterator[Result]:
    """Results in the order of the items, for any number of workers. At most two items per worker are in flight.

    Workers are processes; or threads, for work that releases Python's global interpreter lock most of the time.
    With GPTPIPE_ENGINE=ray they belong to a Ray cluster, unless the work is `local`. `small` says that starting
    processes would take longer than the work: it is done here or in threads, never on Ray. `isolate` uses a
    process even for one item or one worker, because native code may crash. `work` must be picklable unless it
    runs in threads: a function of a module, or a partial of one.

    An error of a worker is raised here. A worker that dies is a ResourceError that names the item by
    `describe`. If the work parses files from elsewhere, `parses` gives the name of an item's file, and a crash
    is an InputError.
    """
    on_ray = uses_ray() and not (small or local)
    rest = iter(items)
    first = list(islice(rest, 2 if on_ray else n_workers()))  # there are no more workers than items
    n = len(first)
    all_items = chain(first, rest)
    if on_ray and n > 1:
        yield from _map_on_ray(work, all_items, describe, parses)
    elif threads and n > 1:
        yield from _map_in_threads(work, all_items, n)
    elif n and (isolate or (n > 1 and not small)):
        yield from _map_in_processes(work, all_items, n, describe, parses)
    else:
        yield from map(work, all_items)


def _map_in_threads(work: Callable[[Item], Result], items: Iterable[Item], n: int) -> Iterator[Result]:
    with ThreadPoolExecutor(n) as pool:
        try:
            yield from _results_in_order(lambda item: pool.submit(work, item), items, 2 * n)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _map_in_processes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    n: int,
    describe: Callable[[Item], str],
    parses: Callable[[Item], str] | None,
) -> Iterator[Result]:
    """Each of `n` threads of this process waits for one worker process."""
    workers: list[Worker[Item, Result]] = []
    idle = SimpleQueue[Worker[Item, Result]]()

    def ask_idle_worker(item: Item) -> Result:
        worker = idle.get()
        try:
            return worker.ask(item)
        except WorkerDied as death:
            raise _error_of_death(item, death.exit_code, describe, parses) from None
        finally:
            idle.put(worker)  # also a dead one: its next items fail too, but the first error in order is raised

    try:
        with ThreadPoolExecutor(n) as pool:
            try:
                for _ in range(n):
                    workers.append(Worker(work))
                    idle.put(workers[-1])
                yield from _results_in_order(lambda item: pool.submit(ask_idle_worker, item), items, 2 * n)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.stop()
    finally:  # after the end of all threads
        for worker in workers:
            worker.close()


def _error_of_death(
    item: Item, exit_code: int, describe: Callable[[Item], str], parses: Callable[[Item], str] | None
) -> GptpipeError:
    if parses is not None:
        return death_in_parser(parses(item), exit_code)
    return death_in_work(describe(item), exit_code)


def _map_on_ray(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    describe: Callable[[Item], str],
    parses: Callable[[Item], str] | None,
) -> Iterator[Result]:
    tasks: RayTasks[Item, Result] = RayTasks(work, parses or describe, parses=parses is not None)
    try:
        yield from _results_in_order(tasks.start, items, 2 * tasks.n_cpus())
    finally:
        tasks.cancel()


def _results_in_order(
    start: Callable[[Item], _Pending[Result]], items: Iterable[Item], most_waiting: int
) -> Iterator[Result]:
    """Start `items`, and yield their results in order. At most `most_waiting` results are unread."""
    waiting: deque[_Pending[Result]] = deque()
    for item in items:
        waiting.append(start(item))
        while waiting and (waiting[0].done() or len(waiting) > most_waiting):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

"""A parallel map that returns results in order: in processes or threads of this machine, or on a Ray cluster."""

import importlib
import multiprocessing
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from gptpipe.shell.environment import n_workers, uses_ray
from gptpipe.shell.errors import ResourceError, first_line
from gptpipe.shell.process import end_worker_with_parent

_RAY_RETRIES = 3  # of a task whose worker is lost
_CONNECT_SECONDS = 10  # to find out whether a Ray cluster answers
# `map_in_order`, or Python's own `map` for small work.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], *, threads: bool = False) -> Iterator[Result]:
    """Results in the order of the items, for any number of workers. At most two items per worker are in flight.

    Workers are processes; or threads, for work that releases Python's global interpreter lock most of the time. With
    GPTPIPE_ENGINE=ray they belong to a Ray cluster. `work` must be picklable unless it runs in threads: a function of
    a module, or a partial of one. An error of a worker is raised here; ResourceError if a worker process dies.
    """
    rest = iter(items)
    first = list(islice(rest, n_workers()))  # there are no more workers than items
    all_items = chain(first, rest)
    if first and uses_ray():
        yield from _map_on_ray(work, all_items)
    elif len(first) <= 1:
        yield from map(work, all_items)
    else:
        yield from _map_in_pool(work, all_items, len(first), threads=threads)


def _map_in_pool(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, *, threads: bool
) -> Iterator[Result]:
    with ThreadPoolExecutor(workers) if threads else _process_pool(workers) as pool:
        try:
            yield from _results_in_order(lambda item: pool.submit(work, item), items, 2 * workers)
        except BrokenProcessPool as error:
            raise ResourceError("a worker process was killed; if memory is short, lower GPTPIPE_WORKERS") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _process_pool(n: int) -> Executor:
    """Processes that are spawned, not forked: a fork would copy the locks of the parent's threads."""
    return ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), initializer=end_worker_with_parent)


def _results_in_order(
    start: Callable[[Item], Future[Result]], items: Iterable[Item], most_waiting: int
) -> Iterator[Result]:
    """Start `items`, and yield their results in order. At most `most_waiting` results are unread."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(start(item))
        while waiting and (waiting[0].done() or len(waiting) > most_waiting):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _map_on_ray(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map_in_order` on the Ray cluster of RAY_ADDRESS, or on one that is started on this machine.

    Every machine of the cluster needs gptpipe, and the project's folder under the same path.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ResourceError("GPTPIPE_ENGINE=ray needs `ray`: pip install -e '.[cluster]'") from error
    starts_ray = not ray.is_initialized()
    if starts_ray:
        _connect(ray)
    try:
        task = ray.remote(max_retries=_RAY_RETRIES)(_work_in_folder)
        shared_work = ray.put(work)
        n_cpus = int(ray.cluster_resources().get("CPU", 1))

        def start(item: Item) -> Future[Result]:
            future: Future[Result] = task.remote(Path.cwd(), shared_work, item).future()
            return future

        yield from _results_in_order(start, items, 2 * n_cpus)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ResourceError(f"a Ray task was lost: {first_line(error)}; check the cluster, then rerun") from error
    finally:
        if starts_ray:
            ray.shutdown()


def _connect(ray: Any) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine. Raises ResourceError."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        resources = {} if address else {"num_cpus": n_workers()}
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False, **resources)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        if address:
            raise ResourceError(f"cannot connect to Ray at {address}: {reason}; check RAY_ADDRESS") from error
        raise ResourceError(f"cannot start Ray: {reason}; set GPTPIPE_ENGINE=local, or check ray") from error


def _work_in_folder(folder: Path, work: Callable[[Item], Result], item: Item) -> Result:
    """Call `work` in the project's folder, because paths are relative to it."""
    os.chdir(folder)
    return work(item)

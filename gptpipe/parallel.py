"""One ordered map over shards, on all cores, or on all machines of a Ray cluster."""

import importlib
import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from gptpipe.environment import n_workers, uses_ray
from gptpipe.errors import ResourceError, first_line

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

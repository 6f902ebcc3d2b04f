"""The tasks of `map_in_order` on a Ray cluster.

Every machine needs gptpipe, and the project's folder under the same path. This process connects once, and
disconnects when it ends. That takes seconds, so small work is better done locally.
"""

import atexit
import importlib
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

from gptpipe.shell.environment import n_workers
from gptpipe.shell.errors import GptpipeError, InputError, ResourceError, first_line

_RETRIES = 3  # of a task whose worker is lost
_CONNECT_SECONDS = 10  # to find out whether a Ray cluster answers
_CANCEL_SECONDS = 60  # until cancelled tasks have ended
Item = TypeVar("Item")
Result = TypeVar("Result")


class RayTasks(Generic[Item, Result]):
    """Starts tasks that call `work`. `name_of` names an item in errors; `parses`: items are foreign files."""

    def __init__(self, work: Callable[[Item], Result], name_of: Callable[[Item], str], *, parses: bool) -> None:
        self.ray = _connected_ray()
        self._name_of = name_of
        self._parses = parses
        self._task = self.ray.remote(max_retries=_RETRIES)(_work_in_folder)
        self._folder = Path.cwd()
        self._work = self.ray.put(work)  # each machine gets it once, not with each task
        self._unread: set[Any] = set()  # references to results

    def n_cpus(self) -> int:
        """Of the machines that are in the cluster now."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def start(self, item: Item) -> "RayTask[Item, Result]":
        reference = self._task.remote(self._folder, self._work, item)
        self._unread.add(reference)
        return RayTask(self, item, reference)

    def forget(self, reference: Any) -> None:
        """Let Ray delete a result that has been read."""
        self._unread.discard(reference)

    def lost(self, item: Item, error: Exception) -> GptpipeError:
        """The error for an item whose task was lost `1 + _RETRIES` times."""
        name = self._name_of(item)
        if self._parses and isinstance(error, self.ray.exceptions.WorkerCrashedError):
            return InputError(
                f"{name}: its reader crashed {1 + _RETRIES} times: the file is damaged; replace it"
            )
        reason = first_line(error)
        return ResourceError(f"a Ray task was lost at {name}: {reason}; check the cluster, then rerun")

    def cancel(self) -> None:
        """End the tasks whose results were not read, and wait for that, because they may be writing files."""
        running = list(self._unread)
        deadline = time.monotonic() + _CANCEL_SECONDS
        while running and time.monotonic() < deadline:
            for reference in running:  # again each second, because a busy machine has lost a request
                self.ray.cancel(reference, force=True)
            _, running = self.ray.wait(running, num_returns=len(running), timeout=1, fetch_local=False)
        self._unread.clear()


class RayTask(Generic[Item, Result]):
    """The result of a task, now or later; it has the two methods of a Future that `map_in_order` needs."""

    def __init__(self, tasks: RayTasks[Item, Result], item: Item, reference: Any) -> None:
        self._tasks = tasks
        self._item = item
        self._reference = reference
        self._future: Future[Result] = reference.future()

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> Result:
        """Raises the error of `work`; ResourceError or InputError, naming the item, if its worker is lost."""
        exceptions = self._tasks.ray.exceptions
        try:
            result = self._future.result()
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except exceptions.RayError as error:
            raise self._tasks.lost(self._item, error) from error
        self._tasks.forget(self._reference)
        return result


def _work_in_folder(folder: Path, work: Callable[[Item], Result], item: Item) -> Result:
    """Call `work` in the project's folder, because paths are relative to it."""
    os.chdir(folder)
    return work(item)


def _connected_ray() -> Any:
    """The module `ray`, connected to the cluster of RAY_ADDRESS, or to one that is started on this machine."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ResourceError("GPTPIPE_ENGINE=ray needs `ray`: pip install -e '.[cluster]'") from error
    if not ray.is_initialized():
        _connect(ray)
        atexit.register(ray.shutdown)
    return ray


def _connect(ray: Any) -> None:
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

"""The record of a training. It does not wait for the store, and survives failures of the store.

A separate thread sends the operations in order, and the points of the curves together every few seconds. What
the store has not taken when the training ends goes to the outbox.
"""

import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

from gptpipe.base.manifest import Manifest
from gptpipe.base.params import Section
from gptpipe.record.description import describe_run
from gptpipe.record.outbox import keep, outbox_folder, send_outbox
from gptpipe.record.store import Operation, RefusedError, RunWriter, StoreError, without_credentials
from gptpipe.shell.console import complain
from gptpipe.shell.environment import tracking_uri
from gptpipe.shell.errors import Interrupted, NumericError, first_line

Metrics = dict[str, float]
_Point = tuple[str, float, int, int]  # key, value, milliseconds since 1970, step

_RETRY_SECONDS = 15.0  # between two attempts to reach a store that does not answer
# Between two groups of points: a request costs as much time as its first hundred points. Without other
# operations, processor, memory, disk and GPUs are measured as often.
_POINTS_SECONDS = 10.0
_START_SECONDS = 5.0  # maximal wait for the first answer of the store at the start of a training
_CLOSE_SECONDS = 30.0  # maximal wait at the end, for a store that answers
_STOP_SECONDS = 5.0  # the same for a store that does not answer, or after a signal


class RunRecord:
    """One run. Its methods return at once, and raise nothing if the store fails."""

    def __init__(self, run_id: str | None, description: dict[str, Any]) -> None:
        self._writer = RunWriter(run_id or uuid.uuid4().hex)
        # The first operation is removed after the store has taken it.
        self._waiting: deque[Operation] = deque([("create", description)])
        self._points: list[_Point] = []  # of the curves, newer than what is in the queue
        self._queue_lock = threading.Lock()  # of both
        self._refused: list[Operation] = []
        self._has_new = threading.Event()  # operations are waiting
        self._has_tried = threading.Event()  # the thread has tried to send once
        self._is_closing = threading.Event()  # no more operations will come
        self._is_given_up = False
        self._store_answers = False
        self._has_complained = False
        self._monitors = [CPUMonitor(), DiskMonitor()]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self._monitors.append(GPUMonitor())
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        # Wait for the run's id if possible. SQLite answers or refuses in any case; a server may not answer at
        # all.
        self._has_tried.wait(None if tracking_uri().startswith("sqlite:") else _START_SECONDS)

    @property
    def run_id(self) -> str:
        """The run's id. Before the store has answered, the name under which it will find the run."""
        return self._writer.run_id or self._writer.name

    def metrics(self, entries: list[tuple[int, int, Metrics]]) -> None:
        """Log (step, milliseconds since 1970, metrics). Steps that the store already has stay unchanged.

        They are sent before the next operation of another kind, or after _POINTS_SECONDS.
        """
        points = [
            (key, value, time_ms, step) for step, time_ms, metrics in entries for key, value in metrics.items()
        ]
        with self._queue_lock:
            self._points += points

    def text(self, name: str, content: str) -> None:
        """Log a text as an artifact."""
        self._put("text", [name, content])

    def tags(self, tags: dict[str, str]) -> None:
        """Set tags. An empty text removes the tag."""
        self._put("tags", tags)

    def _put(self, kind: str, content: Any) -> None:
        """Add an operation to the queue, after all points that are logged so far."""
        if content:
            self._queue_points()
            self._waiting.append((kind, content))
            self._has_new.set()

    def _queue_points(self) -> None:
        """Move the points to the queue, as one operation."""
        with self._queue_lock:
            if self._points:
                self._waiting.append(("metrics", self._points))
                self._points = []

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED. Operations that are not sent in time go to the outbox."""
        self._put("end", status)
        self._is_closing.set()
        self._has_new.set()
        is_patient = self._store_answers and status != "KILLED"
        self._thread.join(timeout=_CLOSE_SECONDS if is_patient else _STOP_SECONDS)
        self._is_given_up = True  # from now on, only `send_outbox` writes to this run
        path = outbox_folder() / f"{self._writer.name}.jsonl"
        keep(path.with_name(f"{path.name}.refused"), list(self._refused))
        unsent = list(self._waiting)
        if unsent and keep(path, unsent):
            complain(f"warning: {len(unsent)} records of this run wait in {path.parent} for the tracking store")

    def _work(self) -> None:
        """The thread: send operations as they come, and measure the machine when there are none."""
        try:
            send_outbox()
            while True:
                self._has_new.clear()
                # Read before sending: all operations are in the queue.
                is_last_round = self._is_closing.is_set()
                self._queue_points()
                is_sent = self._send()
                self._has_tried.set()
                if is_last_round:
                    return
                if not is_sent:
                    self._is_closing.wait(_RETRY_SECONDS)
                elif not self._has_new.wait(_POINTS_SECONDS):
                    self._measure_system()
        except Exception as error:  # the training must continue, whatever it is; `close` keeps what is not sent
            reason = without_credentials(first_line(error))[:200]
            complain(
                f"warning: tracking stopped ({type(error).__name__}: {reason}); "
                "the training continues, and the record is kept"
            )
        finally:
            self._has_tried.set()  # the training waits for this

    def _send(self) -> bool:
        """Send in order, until everything is sent or the store fails. Returns whether everything is sent."""
        try:
            while self._waiting and not self._is_given_up:
                self._send_first()
        except StoreError as error:
            self._store_answers = False
            if not self._has_complained:
                complain(
                    f"warning: the tracking store does not answer ({error}); "
                    "the training continues, and the record is kept"
                )
                self._has_complained = True
            return False
        return True

    def _send_first(self) -> None:
        """Send the first operation, and remove it once the store has taken or refused it. Raises StoreError."""
        operation = self._waiting[0]
        try:
            self._writer.write(operation)
            self._store_answers = True
        except RefusedError as error:
            self._refused.append(operation)
            complain(
                f"warning: {error}; the training continues, and `{operation[0]}` is kept in {outbox_folder()}"
            )
        self._waiting.popleft()

    def _measure_system(self) -> None:
        """Log the load of the machine.

        The step is the time in seconds, so that a resumed run never repeats one.
        """
        now = time.time()
        metrics: Metrics = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self.metrics(
            [(int(now), int(now * 1000), {f"system/{name}": value for name, value in metrics.items()})]
        )


@contextmanager
def training_run(
    params: Section, run_id: str | None, split: Manifest, environment: dict[str, Any], n_parameters: int
) -> Iterator[RunRecord]:
    """The record of a training: a new run, or the run `run_id` of a resumed training.

    Its status says how the training ended: FINISHED, KILLED by a signal, or FAILED.
    """
    record = RunRecord(run_id, describe_run(params, split, environment, n_parameters))
    status = "FAILED"
    try:
        record.tags({"mlflow.source.name": "stages.train"})
        yield record
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    except NumericError as error:
        record.tags({f"red_flag.{error.red_flag}": str(error)})
        raise
    finally:
        record.close(status)

"""The record of a training. It neither waits for the store nor ends with it.

Operations go out in order on a thread of their own. What the store has not taken when the training ends stays in
`.gptpipe/outbox/`, one file a run, and goes out with the next command that logs.
"""

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

from gptpipe.config import Params
from gptpipe.console import complain, say
from gptpipe.environment import project_root, tracking_uri
from gptpipe.errors import Interrupted, NumericError
from gptpipe.files import Manifest, write_bytes
from gptpipe.tracking.store import Operation, RunWriter, StoreError, describe_run

Metrics = dict[str, float]

_RETRY_SECONDS = 15.0
_SYSTEM_SECONDS = 10.0  # without news before a look at processor, memory, disk and GPUs
_START_SECONDS = 5.0  # that the start of a training waits for the store's first answer
_CLOSE_SECONDS = 30.0  # that its end waits for a store that answers ...
_STOP_SECONDS = 5.0  # ... and for one that does not, or where a signal ends it


class RunRecord:
    """One run; its methods return at once and raise nothing for a store that fails."""

    def __init__(self, run_id: str | None, description: dict[str, Any]) -> None:
        self._writer = RunWriter(run_id or uuid.uuid4().hex)
        self._waiting: deque[Operation] = deque([("create", description)])  # the first goes when the store has taken it
        self._news, self._tried, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._has_complained = self._answers = False
        self._monitors = [CPUMonitor(), DiskMonitor()]
        with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self._monitors.append(GPUMonitor())
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        # So that the run's id is known from the start where that can be; a file answers or refuses, however late.
        self._tried.wait(None if tracking_uri().startswith("sqlite:") else _START_SECONDS)

    @property
    def run_id(self) -> str:
        """The run's id; before the store has answered for the first time, the name under which it will find the run."""
        return self._writer.run_id or self._writer.name

    def metrics(self, entries: list[tuple[int, int, Metrics]]) -> None:
        """Log (step, milliseconds since 1970, metrics); a step that the store has already is left as it is."""
        rows = [(key, value, time_ms, step) for step, time_ms, metrics in entries for key, value in metrics.items()]
        self._put("metrics", rows)

    def text(self, name: str, content: str) -> None:
        """Log a text as an artifact."""
        self._put("text", [name, content])

    def tags(self, tags: dict[str, str]) -> None:
        self._put("tags", tags)

    def _put(self, kind: str, content: Any) -> None:
        if content:
            self._waiting.append((kind, content))
            self._news.set()

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; what is not sent in time goes to the outbox."""
        self._put("end", status)
        self._closing.set()
        self._news.set()
        is_patient = self._answers and status != "KILLED"
        self._thread.join(timeout=_CLOSE_SECONDS if is_patient else _STOP_SECONDS)
        if left := list(self._waiting):
            path = _outbox() / f"{self._writer.name}.jsonl"
            before = path.read_bytes() if path.exists() else b""  # of the same run, from before it was resumed
            write_bytes(path, before + "".join(json.dumps(op) + "\n" for op in left).encode())
            complain(f"warning: {len(left)} records of this run wait in {_outbox()} for the tracking store")

    def _work(self) -> None:
        try:
            send_outbox()
            while True:
                self._news.clear()
                is_closing = self._closing.is_set()  # all has been put, and is tried now
                is_sent = self._send()
                self._tried.set()
                if is_closing:
                    return
                if not is_sent:
                    self._closing.wait(_RETRY_SECONDS)
                elif not self._news.wait(_SYSTEM_SECONDS):
                    self._put("metrics", self._system_metrics())
        finally:
            self._tried.set()  # or the training would wait for a thread that is no more

    def _system_metrics(self) -> list[tuple[str, float, int, int]]:
        """How busy the machine is, at the second of the clock as the step: a resumed run never repeats one."""
        now, found = time.time(), dict[str, float]()
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return [(f"system/{name}", value, int(now * 1000), int(now)) for name, value in found.items()]

    def _send(self) -> bool:
        """Send in order until all is sent or the store fails; returns whether all is."""
        try:
            while self._waiting:
                self._writer.write(self._waiting[0])
                self._waiting.popleft()
                self._answers = True
        except StoreError as error:
            self._answers = False
            if not self._has_complained:
                complain(f"warning: the tracking store does not answer ({error}); training goes on, the record is kept")
                self._has_complained = True
            return False
        return True


@contextmanager
def training_run(
    params: Params, run_id: str | None, lineage: Manifest, environment: dict[str, Any]
) -> Iterator[RunRecord]:
    """The record of a training: a new run, or the run `run_id` that a resumed training began.

    Its status says how the training ended: FINISHED, KILLED by a signal, or FAILED.
    """
    record = RunRecord(run_id, describe_run(params, lineage, environment))
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


def send_outbox() -> None:
    """Send what earlier runs could not; stops where the store fails and leaves the rest for the next time."""
    with suppress(Timeout), FileLock(_outbox().with_suffix(".lock"), timeout=0):  # else another process is at it
        for path in sorted(_outbox().glob("*.jsonl")):
            operations: list[Operation] = [json.loads(line) for line in path.read_bytes().splitlines()]
            writer = RunWriter(path.stem)
            try:
                for operation in operations:
                    writer.write(operation)
            except StoreError as error:
                complain(f"warning: {path} waits for the tracking store ({error})")
                return
            path.unlink()
            say(f"tracking: sent {len(operations)} records of run {writer.run_id} that had waited")


def _outbox() -> Path:
    return project_root() / ".gptpipe" / "outbox"

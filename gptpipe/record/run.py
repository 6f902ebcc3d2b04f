"""The record of a training. It does not wait for the store, and survives the store's failures.

A separate thread sends the operations in order. Those that the store has not taken when the training ends are kept in
`.gptpipe/outbox/`, one file per run, and the next command that logs sends them. What can never be sent does not block
the rest: it is moved to a file beside it, which a warning names. `RUN.jsonl.damaged` has what is not an operation,
`RUN.jsonl.refused` has what the store refuses whenever it is asked.
"""

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from pydantic import Field, FiniteFloat, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import Manifest
from gptpipe.base.params import Section
from gptpipe.record.store import (
    RUN_ID,
    Operation,
    RefusedError,
    RunWriter,
    StoreError,
    describe_run,
    without_credentials,
)
from gptpipe.shell.console import complain, say
from gptpipe.shell.environment import project_root, tracking_uri
from gptpipe.shell.errors import Interrupted, NumericError, ResourceError, first_line

Metrics = dict[str, float]

# What a line of the outbox may be: the operations of `RunWriter.write`. Whole numbers fit into the store's columns.
_Name = Annotated[str, StringConstraints(min_length=1, max_length=250)]
_ArtifactPath = Annotated[str, StringConstraints(pattern=r"^[\w-][\w. -]*(/[\w-][\w. -]*)*$", max_length=250)]
_Whole = Annotated[int, Field(ge=0, lt=2**53)]
_Texts = dict[_Name, str]


class _Dataset(TypedDict):
    """One of the data sets of a run."""

    name: _Name
    digest: _Name
    source_type: _Name
    source: _Name
    profile: str


class _Description(TypedDict):
    """Content of `create`, as `describe_run` makes it."""

    name: str | None
    tags: _Texts
    params: _Texts
    datasets: list[_Dataset]
    texts: dict[_ArtifactPath, str]


_OPERATION: TypeAdapter[Operation] = TypeAdapter(
    tuple[Literal["create"], _Description]
    | tuple[Literal["metrics"], list[tuple[_Name, FiniteFloat, _Whole, _Whole]]]
    | tuple[Literal["text"], tuple[_ArtifactPath, str]]
    | tuple[Literal["tags"], _Texts]
    | tuple[Literal["end"], Literal["FINISHED", "FAILED", "KILLED"]]
)

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
        self._refused: list[Operation] = []
        self._has_complained = self._answers = self._is_given_up = False
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
        self._is_given_up = True  # from here on, the outbox's reader alone writes to this run
        name = f"{self._writer.name}.jsonl"
        _keep(_outbox() / f"{name}.refused", list(self._refused))
        if (left := list(self._waiting)) and _keep(_outbox() / name, left):
            complain(f"warning: {len(left)} records of this run wait in {_outbox()} for the tracking store")

    def _work(self) -> None:
        try:
            send_outbox()
            while True:
                self._news.clear()
                is_closing = self._closing.is_set()  # everything has been put, and is tried now
                is_sent = self._send()
                self._tried.set()
                if is_closing:
                    return
                if not is_sent:
                    self._closing.wait(_RETRY_SECONDS)
                elif not self._news.wait(_SYSTEM_SECONDS):
                    self._put("metrics", self._system_metrics())
        except Exception as error:  # whatever it is, training goes on, and `close` keeps what is not sent
            reason = without_credentials(first_line(error))[:200]
            complain(
                f"warning: tracking stopped ({type(error).__name__}: {reason}); training goes on, the record is kept"
            )
        finally:
            self._tried.set()  # the training waits for this

    def _system_metrics(self) -> list[tuple[str, float, int, int]]:
        """How busy the machine is, at the second of the clock as the step: a resumed run never repeats one."""
        now, found = time.time(), dict[str, float]()
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return [(f"system/{name}", value, int(now * 1000), int(now)) for name, value in found.items()]

    def _send(self) -> bool:
        """Send in order until all is sent or the store fails; returns whether all is sent."""
        try:
            while self._waiting and not self._is_given_up:
                try:
                    self._writer.write(self._waiting[0])
                    self._answers = True
                except RefusedError as error:
                    self._refused.append(self._waiting[0])
                    complain(f"warning: {error}; training goes on, `{self._waiting[0][0]}` is kept in {_outbox()}")
                self._waiting.popleft()
        except StoreError as error:
            self._answers = False
            if not self._has_complained:
                complain(f"warning: the tracking store does not answer ({error}); training goes on, the record is kept")
                self._has_complained = True
            return False
        return True


@contextmanager
def training_run(
    params: Section, run_id: str | None, lineage: Manifest, environment: dict[str, Any]
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
    """Send what earlier runs could not. Stops where the store fails, and leaves the rest for the next time."""
    try:
        with FileLock(_outbox().with_suffix(".lock"), timeout=0):
            for path in sorted(_outbox().glob("*.jsonl")):
                if not _send_file(path):
                    return
    except Timeout:  # another process is sending
        return
    except OSError as error:
        complain(f"warning: {_outbox()}: {error.strerror or error}; make it readable and writable to send what waits")


def _send_file(path: Path) -> bool:
    """Send the operations of one run, then remove their file; returns whether the store answers."""
    content = path.read_bytes()
    if not content:
        complain(f"warning: {path}: it is empty, so records of this run are lost; the file is removed")
    operations, damaged = _parse(content) if RUN_ID.fullmatch(path.stem) else ([], content.splitlines(keepends=True))
    writer, refused = RunWriter(path.stem), list[Operation]()
    reason: StoreError | None = None
    for operation in operations:
        try:
            writer.write(operation)
        except RefusedError as error:
            refused.append(operation)
            reason = error
        except StoreError as error:
            complain(f"warning: {path} waits for the tracking store ({error})")
            return False
    for kind, left, why in (
        ("damaged", b"".join(damaged), f"{len(damaged)} lines are not records of a run"),
        ("refused", _to_lines(refused), f"{len(refused)} records are refused ({reason})"),
    ):
        if left:
            aside = path.with_name(f"{path.name}.{kind}")
            write_bytes(aside, left)
            complain(f"warning: {path}: {why}; they are kept in {aside}, remove it if they are not needed")
    if path.read_bytes() == content:  # else a training has added to it meanwhile
        path.unlink()
    if n_sent := len(operations) - len(refused):
        say(f"tracking: sent {n_sent} records of run {writer.run_id} that had waited")
    return True


def _parse(content: bytes) -> tuple[list[Operation], list[bytes]]:
    """The operations in a file of the outbox, and the lines that are none."""
    operations: list[Operation] = []
    damaged: list[bytes] = []
    for line in content.splitlines(keepends=True):
        try:
            operations.append(_OPERATION.validate_json(line, strict=True))
        except ValidationError:
            damaged.append(line)
    return operations, damaged


def _keep(path: Path, operations: list[Operation]) -> bool:
    """Add operations to a file of the outbox; returns whether they are on disk. A full disk does not end a training."""
    if not operations:
        return True
    try:
        before = path.read_bytes() if path.exists() else b""  # of the same run, from before it was resumed
        write_bytes(path, before + _to_lines(operations))
    except (OSError, ResourceError) as error:
        complain(f"warning: {len(operations)} records of this run are lost: {first_line(error)}")
        return False
    return True


def _to_lines(operations: list[Operation]) -> bytes:
    return "".join(json.dumps(operation) + "\n" for operation in operations).encode()


def _outbox() -> Path:
    return project_root() / ".gptpipe" / "outbox"

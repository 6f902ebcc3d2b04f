"""Faults at a file operation of a stage.

A stage's operations are counted from 1: each open for writing, write, fsync, rename, removal and new folder
below the project, and each commit to a SQL database. An audit hook, which CPython calls before it acts, sees
most of them. Writes, fsync and commits have no audit event, so `install` replaces `open` and `os.fsync`, and
listens to SQLAlchemy.

`install` cannot be undone: call it in a forked process only.
"""

import builtins
import errno
import io
import mmap
import os
import pickle
import signal
import sqlite3
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REMOVALS = {"os.remove": "remove", "os.rmdir": "rmdir"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Fault:
    """A fault at operation `at`. With `at` 0, operations are only counted."""

    do: str = "count"  # count | signal | fail | short | cut
    at: int = 0
    # signal: the first one at operation `at`, each further one at the next operation.
    signals: tuple[str, ...] = ()
    error: str = "ENOSPC"  # fail, short: the name of the error
    for_ever: bool = False  # fail: all later operations fail too
    only: str = ""  # fail: the kind of operations that fail; empty: all kinds


class Counters:
    """Numbers that a forked process shares with its parent, which can read them after a SIGKILL."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def get(self, place: int) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * place)[0])

    def set(self, place: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * place, value)

    @property
    def operations(self) -> int:
        return self.get(0)

    @property
    def optimizer_steps(self) -> int:
        return self.get(1)


class _Watcher:
    """Counts the operations on `root` and below, and causes the fault at its operation."""

    def __init__(self, fault: Fault, root: Path, counters: Counters, trace: Path | None) -> None:
        self.fault, self.counters = fault, counters
        self.root = f"{root}{os.sep}"
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if trace else None
        self.lock = threading.Lock()
        self.local = threading.local()
        self.short = False  # whether the last write was a short one

    def before_operation(self, kind: str, path: str, other: str = "") -> None:
        """Called before each operation. Raises the error of the fault, or ends the process."""
        is_in_project = f"{path}{os.sep}".startswith(self.root)
        if getattr(self.local, "busy", False) or not is_in_project:
            return
        self.local.busy = True
        try:
            with self.lock:
                number = self.counters.operations + 1
                self.counters.set(0, number)
                self._act(number, kind, path, other)
        finally:
            self.local.busy = False

    def _act(self, number: int, kind: str, path: str, other: str) -> None:
        fault = self.fault
        is_now = number == fault.at
        if fault.do == "cut":
            if is_now:
                os.kill(os.getpid(), signal.SIGKILL)
            self._record(kind, path, other)
        elif fault.do == "signal" and 0 <= number - fault.at < len(fault.signals):
            os.kill(os.getpid(), signal.Signals[fault.signals[number - fault.at]])
        elif fault.do == "fail" and (is_now or (fault.for_ever and number > fault.at > 0)):
            if fault.only in ("", kind):
                _raise(fault.error, kind, path)
        elif fault.do == "short" and fault.at > 0 and (is_now or self.short):
            if kind == "write" and not self.short:
                self.short = True  # only half of this write is done; the next operation fails
                self.local.halves = True
            else:
                self.short = False
                _raise(fault.error, kind, path)

    def takes_half(self) -> bool:
        halves = getattr(self.local, "halves", False)
        self.local.halves = False
        return halves

    def _record(self, kind: str, path: str, other: str) -> None:
        if self.trace is None:
            return
        content = None
        if kind == "fsync" and not os.path.isdir(path):  # noqa: PTH112
            content = Path(path).read_bytes()
        os.write(self.trace, pickle.dumps((kind, path, other, content)))


def read_trace(path: Path) -> list[tuple[str, str, str, bytes | None]]:
    """Operations before a power cut: kind, path, new path of a rename, content that an fsync made durable."""
    records = []
    with path.open("rb") as file:
        while file.peek(1):
            records.append(pickle.load(file))
    return records


def install(fault: Fault, root: Path, counters: Counters, trace: Path | None = None) -> None:
    """Cause `fault` in this process, at its operation below the folder `root`."""
    watcher = _Watcher(fault, root, counters, trace)
    _watch_audit_events(watcher)
    _watch_writes(watcher)
    _watch_fsync(watcher)
    if "sqlalchemy" in sys.modules:  # if it is used, it was imported before the fork
        _watch_commits(watcher)
    if "torch" in sys.modules:
        _count_optimizer_steps(counters)


def _raise(name: str, kind: str, path: str) -> None:
    number = getattr(errno, name)
    if kind == "commit":
        from sqlalchemy.exc import OperationalError

        text = "database or disk is full" if name == "ENOSPC" else "disk I/O error"
        raise OperationalError("COMMIT", None, sqlite3.OperationalError(text))
    raise OSError(number, os.strerror(number), path)


def _watch_audit_events(watcher: _Watcher) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and not isinstance(path, int):
                watcher.before_operation("open", _absolute(path))
        elif event == "os.rename":
            watcher.before_operation(
                "rename", _absolute(arguments[0], arguments[2]), _absolute(arguments[1], arguments[3])
            )
        elif event in _REMOVALS:
            watcher.before_operation(_REMOVALS[event], _absolute(arguments[0], arguments[1]))
        elif event == "os.mkdir":
            path = _absolute(arguments[0], arguments[2])
            if not os.path.isdir(path):  # noqa: PTH112  with `exist_ok`, this is not an operation
                watcher.before_operation("mkdir", path)
        elif event == "os.truncate" and not isinstance(arguments[0], int):
            watcher.before_operation("open", _absolute(arguments[0]))

    sys.addaudithook(hook)


def _absolute(path: Any, folder: int = -1) -> str:
    text = os.fsdecode(path)
    if folder != -1 and not os.path.isabs(text):  # noqa: PTH117
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)  # noqa: PTH115, PTH118
    return os.path.abspath(text)  # noqa: PTH100


def _watch_writes(watcher: _Watcher) -> None:
    """Replace `open`, so that each write(2) of a Python file object is an operation."""

    class WatchedFile(io.FileIO):
        def write(self, content: Any) -> int | None:  # type: ignore[override]
            watcher.before_operation("write", _absolute(self.name))
            if watcher.takes_half():
                return super().write(memoryview(content).cast("B")[: max(1, len(content) // 2)])
            return super().write(content)

    original = io.open

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        newline: Any = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        is_writing = any(letter in mode for letter in "wax+")
        if (
            not is_writing
            or isinstance(file, int)
            or buffering == 0
            or not _absolute(file).startswith(watcher.root)
        ):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = WatchedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    io.open = builtins.open = opened  # type: ignore[assignment]


def _watch_fsync(watcher: _Watcher) -> None:
    original = os.fsync

    def fsync(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        watcher.before_operation("fsync", os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115
        original(number)

    os.fsync = fsync


def _watch_commits(watcher: _Watcher) -> None:
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def before_commit(connection: Any) -> None:
        watcher.before_operation("commit", _absolute(connection.engine.url.database or ""))

    event.listen(Engine, "commit", before_commit)


def _count_optimizer_steps(counters: Counters) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def count(*_: Any) -> None:
        counters.set(1, counters.optimizer_steps + 1)

    register_optimizer_step_post_hook(count)

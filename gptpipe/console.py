"""What people see while a stage works: one live line on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")
_LIVE_EVERY = 0.1  # seconds between updates of the live line
_PLAIN_EVERY = 10.0  # seconds between lines where no terminal is
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str) -> None:
    """One line for the person at the terminal, above a live progress line if there is one."""
    console.print(text)


def complain(text: str) -> None:
    """An error or a warning."""
    console.print(text, style="bold red" if sys.stderr.isatty() else None)


class Progress:
    """Progress through `total` units of work, or through an unknown number of them."""

    def __init__(self, name: str, *, unit: str, total: int | None = None, done: int = 0) -> None:
        self._name, self._unit, self._total, self._done = name, unit, total, done
        self._note = ""
        self._last_line = time.monotonic()
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn(unit)]
        columns += [TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        self._bar = RichProgress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task(name, total=total, completed=done, note="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """Count `n` units as done; `note` stands beside the count."""
        self._done += n
        self._note = self._note if note is None else note
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            if now - self._last_line > _LIVE_EVERY:
                self._last_line = now
                self._bar.update(self._task, completed=self._done, note=self._note)
        elif now - self._last_line > _PLAIN_EVERY:
            self._last_line = now
            of_total = f" of {self._total:,}" if self._total else ""
            say(f"{self._name}: {self._done:,}{of_total} {self._unit}  {self._note}".rstrip())

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items through, counting each."""
        for item in items:
            yield item
            self.advance()

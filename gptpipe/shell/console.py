"""Console output of a stage: a live view on a terminal; elsewhere a line every few seconds."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from gptpipe.shell.environment import VERBOSITIES, verbosity
from gptpipe.shell.errors import printable as printable

T = TypeVar("T")
_LIVE_EVERY = 0.1  # seconds between two updates of the live view
_PLAIN_EVERY = 10.0  # seconds between two lines without a terminal
_BLOCKS = "▁▂▃▄▅▆▇█"
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str, level: str = "normal") -> None:
    """Print one line if verbosity is at least `level`. It appears above the live view."""
    if VERBOSITIES.index(verbosity()) >= VERBOSITIES.index(level):
        console.print(printable(text))


def complain(text: str) -> None:
    """Print an error or a warning, at any verbosity."""
    console.print(printable(text), style="bold red" if sys.stderr.isatty() else None)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values as a line of blocks; the lowest value is the lowest block."""
    last = values[-width:]
    low = min(last, default=0.0)
    value_range = (max(last, default=0.0) - low) or 1.0
    return "".join(_BLOCKS[round((value - low) / value_range * (len(_BLOCKS) - 1))] for value in last)


class Progress:
    """Shows progress through `total` units of work, or through an unknown number of units."""

    def __init__(self, name: str, *, unit: str, total: int | None = None, done: int = 0) -> None:
        self._name = name
        self._unit = unit
        self._total = total
        self._done = done
        self._note = ""
        self.sample = ""  # generated text; the last line of the live view
        self._last_line = time.monotonic()
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._below = Text(no_wrap=True, overflow="ellipsis")
        self._task = self._bar.add_task(name, total=total, completed=done)
        self._live = Live(Group(self._bar, self._below), console=console, transient=True)

    def __enter__(self) -> Self:
        if console.is_terminal and verbosity() != "quiet":
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def advance(self, n: int = 1, note: str | None = None, course: Sequence[float] = ()) -> None:
        """Count `n` units as done.

        `note` is printed after the count; a terminal also shows `course` as a sparkline.
        """
        self._done += n
        if note is not None:
            self._note = note
        now = time.monotonic()
        if self._live.is_started:
            if now - self._last_line > _LIVE_EVERY:
                self._last_line = now
                lines = (f"{self._note}  {sparkline(course)}".strip(), self.sample)
                self._below.plain = printable("\n".join(line for line in lines if line))
                self._bar.update(self._task, completed=self._done)
        elif now - self._last_line > _PLAIN_EVERY:
            self._last_line = now
            of_total = f" of {self._total:,}" if self._total else ""
            say(f"{self._name}: {self._done:,}{of_total} {self._unit}  {self._note}".rstrip())

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count each as one unit."""
        for item in items:
            yield item
            self.advance()

"""Neighbouring texts of one source on their way into the corpus, and how they are cut into shards."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.formats.corpus import SCHEMA, sizes

SHARD_BYTES = 8 << 20  # of text; a shard is the unit of work and of memory


@dataclass(frozen=True)
class Rejected:
    """A text that does not belong in the corpus."""

    reason: str  # what it is counted under
    detail: str = ""  # what was found


class Batch(NamedTuple):
    """Neighbours of one source: texts as they came in, and what became of each."""

    source: str  # its name
    cut: int  # texts of the source that were cut so far
    texts: list[str | Rejected]
    rows: pa.RecordBatch  # the kept ones, of SCHEMA ...
    positions: npt.NDArray[np.int64]  # ... and where in `texts` each was
    rejected: dict[int, Rejected]  # the others by position

    def without(self, gone: npt.NDArray[np.bool_], reason: Rejected) -> Self:
        """The batch with some of its rows rejected too."""
        if not gone.any():
            return self
        rejected = self.rejected | dict.fromkeys(self.positions[gone].tolist(), reason)
        return self._replace(rows=self.rows.filter(pa.array(~gone)), positions=self.positions[~gone], rejected=rejected)

    def split(self, n_rows: int) -> tuple[Self, Self]:
        """Up to the end of row `n_rows`, which is at least 1, and what follows."""
        end, gone = int(self.positions[n_rows - 1]) + 1, self.rejected.items()
        heads = self.texts[:end], self.rows[:n_rows], self.positions[:n_rows], {i: why for i, why in gone if i < end}
        tails = (self.texts[end:], self.rows[n_rows:], self.positions[n_rows:] - end,
                 {i - end: why for i, why in gone if i >= end})  # fmt: skip
        return type(self)(self.source, self.cut, *heads), type(self)(self.source, self.cut, *tails)


def rows_of_shards(
    batches: Iterable[Batch], count: Callable[[Batch], object] = lambda _: None
) -> Iterator[tuple[pa.Table, bool]]:
    """The rows of each shard, of at least one, and whether it is the last.

    When they come, `count` was told of all that came in before the first row of the next.
    """
    rows: list[pa.RecordBatch] = []
    n_bytes = 0
    for batch in batches:
        while len(batch.rows):
            if n_bytes >= SHARD_BYTES:
                yield pa.Table.from_batches(rows, SCHEMA), False
                rows, n_bytes = [], 0
            ends = n_bytes + sizes(batch.rows).cumsum()
            taken, batch = batch.split(min(len(ends), int(np.searchsorted(ends, SHARD_BYTES)) + 1))
            count(taken)
            rows.append(taken.rows)
            n_bytes = int(ends[len(taken.rows) - 1])
        count(batch)
    yield pa.Table.from_batches(rows, SCHEMA), True

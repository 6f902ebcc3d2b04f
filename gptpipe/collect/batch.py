"""A batch of texts from one source on its way into the corpus, and how batches become shards."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.formats.corpus import SCHEMA, sizes

SHARD_BYTES = 8 << 20  # of text; stages process one shard at a time


@dataclass(frozen=True)
class Rejected:
    """A text that does not belong in the corpus."""

    reason: str  # the name of its count
    detail: str = ""  # for the report: what is wrong with it


class Batch(NamedTuple):
    """Consecutive texts of one source: the raw texts, and for each either a row or a rejection."""

    source: str  # name
    cut: int  # number of cuts in long texts of the source so far
    texts: list[str | Rejected]  # raw
    rows: pa.RecordBatch  # the kept documents, of SCHEMA
    positions: npt.NDArray[np.int64]  # of each row: the index of its raw text in `texts`
    rejected: dict[int, Rejected]  # the other texts, by their index in `texts`

    def without(self, is_rejected: npt.NDArray[np.bool_], reason: Rejected) -> Self:
        """The batch after rejecting some of its rows."""
        if not is_rejected.any():
            return self
        return self._replace(
            rows=self.rows.filter(pa.array(~is_rejected)),
            positions=self.positions[~is_rejected],
            rejected=self.rejected | dict.fromkeys(self.positions[is_rejected].tolist(), reason),
        )

    def split(self, n_rows: int) -> tuple[Self, Self]:
        """The batch up to the text of row `n_rows` (at least 1), and the rest."""
        end = int(self.positions[n_rows - 1]) + 1
        head = self._replace(
            texts=self.texts[:end],
            rows=self.rows[:n_rows],
            positions=self.positions[:n_rows],
            rejected={i: reason for i, reason in self.rejected.items() if i < end},
        )
        rest = self._replace(
            texts=self.texts[end:],
            rows=self.rows[n_rows:],
            positions=self.positions[n_rows:] - end,
            rejected={i - end: reason for i, reason in self.rejected.items() if i >= end},
        )
        return head, rest


def rows_of_shards(
    batches: Iterable[Batch], count: Callable[[Batch], object] = lambda _: None
) -> Iterator[tuple[pa.Table, bool]]:
    """Yield the rows of each shard, and whether it is the last. There is at least one, maybe empty.

    Before a shard is yielded, `count` is called with all texts up to the first row of the next shard.
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

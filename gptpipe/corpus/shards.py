"""The corpus on disk: `docs-00000.parquet` and so on, cut by size of text, in the order of the sources."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa

from gptpipe.corpus.document import Document
from gptpipe.parquet import new_parquet, read_parquet

SHARD_BYTES = 8 << 20  # of text; a shard is the unit of work and of memory
_BATCH_ROWS, _BATCH_BYTES = 1024, 1 << 20  # of documents that wait to be written
_SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string()), ("n_bytes", pa.int64())])


def write_shards(documents: Iterable[Document], folder: Path, advance: Callable[[int], object] = int) -> None:
    """Write documents into as many shards as they need, at least one; tells `advance` how many were taken."""
    waiting = iter(documents)
    number = 0
    while (first := next(waiting, None)) or number == 0:
        with new_parquet(folder / f"docs-{number:05d}.parquet", _SCHEMA) as rows:
            for some in _batches(chain([first], waiting) if first else waiting):
                columns = zip(*((d.id, d.source, d.text, d.n_bytes) for d in some), strict=True)
                rows.extend(pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=_SCHEMA))
                advance(len(some))
        number += 1


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """The documents of one shard, some at a time; takes no more of them."""
    some: list[Document] = []
    size = of_some = 0
    for document in documents:
        some.append(document)
        size, of_some = size + document.n_bytes, of_some + document.n_bytes
        if len(some) == _BATCH_ROWS or of_some > _BATCH_BYTES:
            yield some
            some, of_some = [], 0
        if size >= SHARD_BYTES:
            break
    if some:
        yield some


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("docs-*.parquet"))


def read_documents(shard: Path) -> Iterator[tuple[str, Document]]:
    """Ids and documents of a shard, in order. Raises IntegrityError."""
    for batch in read_parquet(shard, ["id", "source", "text"]):
        for row in batch.to_pylist():
            yield row["id"], Document(row["source"], row["text"])

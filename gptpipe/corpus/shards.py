"""The corpus on disk: `docs-00000.parquet` and so on, cut by size of text, in the order of the sources."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from gptpipe.corpus.document import Document
from gptpipe.parquet import new_parquet, read_parquet

SHARD_BYTES = 8 << 20  # of text; a shard is the unit of work and of memory
_SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string()), ("n_bytes", pa.int64())])


def write_shards(documents: Iterable[Document], folder: Path) -> None:
    """Write documents into as many shards as they need, at least one."""
    waiting = iter(documents)
    document = next(waiting, None)
    number = 0
    while document is not None or number == 0:
        with new_parquet(folder / f"docs-{number:05d}.parquet", _SCHEMA) as rows:
            size = 0
            while document is not None and size < SHARD_BYTES:
                row = {name: getattr(document, name) for name in _SCHEMA.names}
                rows.append(row, row["n_bytes"])
                size += row["n_bytes"]
                document = next(waiting, None)
        number += 1


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("docs-*.parquet"))


def read_documents(shard: Path) -> Iterator[tuple[str, Document]]:
    """Ids and documents of a shard, in order. Raises IntegrityError."""
    for batch in read_parquet(shard, ["id", "source", "text"]):
        for row in batch.to_pylist():
            yield row["id"], Document(row["source"], row["text"])

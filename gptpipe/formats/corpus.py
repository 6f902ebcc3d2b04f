"""The corpus on disk, data/raw: Parquet files `docs-00000.parquet`, `docs-00001.parquet` and so on.

A row is a document: `id` (SHA-256 of the text), `source` (name of its source), `text` (clean), and `n_bytes`
(size of the text in UTF-8). Documents are in the order of the sources. A file ends when it has enough bytes of
text.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.base.manifest import Manifest
from gptpipe.base.parquet import GROUP_ROWS, new_parquet, verify_rows

SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("text", pa.string()), ("n_bytes", pa.int64())]
)


def id_of(content: bytes) -> str:
    """SHA-256 of a clean text's UTF-8 bytes as hex digits, so a text has the same id on every machine."""
    return hashlib.sha256(content).hexdigest()


def sizes(rows: pa.RecordBatch | pa.Table) -> npt.NDArray[np.int64]:
    """Bytes of text of each row."""
    return np.asarray(rows["n_bytes"], np.int64)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"docs-{number:05d}.parquet"


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("docs-*.parquet"))


def write_shard(path: Path, rows: pa.Table) -> None:
    with new_parquet(path, SCHEMA) as file:
        for batch in rows.combine_chunks().to_batches(GROUP_ROWS):  # the same groups for any batches in `rows`
            file.extend(batch)
    pa.default_memory_pool().release_unused()  # otherwise the pool grows with each shard


def verify_corpus(folder: Path) -> Manifest:
    """The manifest of a corpus, after checking its files and its number of documents. Raises IntegrityError."""
    return verify_rows(folder, {"docs-*.parquet": "documents"})

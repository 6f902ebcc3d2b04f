"""The corpus on disk: `docs-00000.parquet` and so on, cut by size of text, in the order of the sources."""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.base.manifest import Manifest
from gptpipe.base.parquet import GROUP_ROWS, new_parquet, verify_rows

SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string()), ("n_bytes", pa.int64())])


def write_shard(path: Path, rows: pa.Table) -> None:
    with new_parquet(path, SCHEMA) as file:
        for batch in rows.combine_chunks().to_batches(GROUP_ROWS):  # the same groups however the rows came in
            file.extend(batch)
    pa.default_memory_pool().release_unused()  # it would keep some more with each shard


def sizes(rows: pa.RecordBatch | pa.Table) -> npt.NDArray[np.int64]:
    """Bytes of text of each row."""
    return np.asarray(rows["n_bytes"], np.int64)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"docs-{number:05d}.parquet"


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("docs-*.parquet"))


def verify_corpus(folder: Path) -> Manifest:
    """The manifest of a corpus, after checking its files and the number of its documents. Raises IntegrityError."""
    return verify_rows(folder, {"docs-*.parquet": "documents"})


def id_of(content: bytes) -> str:
    """SHA-256 of a clean text's UTF-8 bytes, as hex digits: the same text has the same id on every machine."""
    return hashlib.sha256(content).hexdigest()

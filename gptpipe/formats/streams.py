"""Token streams: for each side one flat, memory-mapped array of tokens and a table of the documents in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gptpipe.base.files import new_file
from gptpipe.base.manifest import Manifest
from gptpipe.base.parquet import ParquetRows, new_parquet, read_parquet, verify_rows
from gptpipe.formats.sides import SIDES, Side
from gptpipe.shell.errors import IntegrityError, first_line

TOKENS = "tokens.npy"
DOCUMENTS = "documents.parquet"
_HEADER_BYTES = 128  # of an .npy file with one dimension
_PART = 1 << 22  # tokens
_SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), *((name, pa.int64()) for name in ("offset", "n_tokens", "n_bytes"))]
)


@dataclass(frozen=True)
class Stream:
    """One side: `tokens` (n_tokens,) on disk; `documents` with id, source, offset, n_tokens, n_bytes in its order."""

    tokens: npt.NDArray[np.unsignedinteger]
    documents: pd.DataFrame

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents; end-of-text tokens have none."""
        return int(self.documents["n_bytes"].sum())


class StreamWriter:
    """Appends documents to one side's token array and table."""

    def __init__(self, tokens: BinaryIO, documents: ParquetRows) -> None:
        self._tokens, self._documents = tokens, documents
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def extend(self, batch: pa.RecordBatch) -> None:
        lists, n_bytes = batch.column("tokens"), batch.column("n_bytes")
        tokens, n_tokens = lists.flatten().to_numpy(), lists.value_lengths().to_numpy().astype(np.int64)
        offset = self.counts["tokens"] + n_tokens.cumsum() - n_tokens
        columns = [batch.column("id"), batch.column("source"), pa.array(offset), pa.array(n_tokens), n_bytes]
        self._documents.extend(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._tokens.write(tokens.tobytes())
        self.counts["documents"] += len(batch)
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += pc.sum(n_bytes).as_py()


@contextmanager
def new_stream(folder: Path, dtype: np.dtype[Any]) -> Iterator[StreamWriter]:
    with new_file(folder / TOKENS) as tokens, new_parquet(folder / DOCUMENTS, _SCHEMA) as documents:
        tokens.write(_header(dtype, 0))
        side = StreamWriter(tokens, documents)
        yield side
        tokens.seek(0)
        tokens.write(_header(dtype, side.counts["tokens"]))


def _header(dtype: np.dtype[Any], n_tokens: int) -> bytes:
    """The head of an .npy file; numpy pads it, so that it has one size for every length of the array."""
    file = BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def verify_split(folder: Path) -> Manifest:
    """The manifest of a split, after checking its files and the number of documents per side. Raises IntegrityError."""
    return verify_rows(folder, {f"{side}/{DOCUMENTS}": f"{side}_documents" for side in SIDES})


def open_stream(folder: Path, side: Side, vocab_size: int | None = None) -> Stream:
    """One side of the split, its tokens memory-mapped. The caller has verified the folder.

    With a `vocab_size`, reads all tokens once to see that each is below it. Raises IntegrityError for a stream that no
    split has written.
    """
    path, table = folder / side / TOKENS, folder / side / DOCUMENTS
    try:
        tokens = _map_tokens(path)
        if vocab_size is not None and (largest := _largest(tokens)) >= vocab_size:
            raise ValueError(f"token {largest:,} is in it, the tokenizer has {vocab_size:,} tokens")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: not a token stream ({first_line(error)}); run `dvc repro -f`") from error
    try:
        documents = pa.Table.from_batches(read_parquet(table, _SCHEMA.names), _SCHEMA)
        _check_documents(documents, len(tokens))
    except (pa.ArrowException, ValueError) as error:
        raise IntegrityError(
            f"{table}: not the documents of {TOKENS} ({first_line(error)}); run `dvc repro -f`"
        ) from error
    return Stream(tokens, documents.to_pandas())


def _map_tokens(path: Path) -> npt.NDArray[np.unsignedinteger]:
    """The array in an .npy file as `StreamWriter` makes it. Raises OSError, ValueError.

    The header is compared with the two that can be, not parsed: numpy evaluates it as Python.
    """
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    n_bytes = path.stat().st_size - _HEADER_BYTES
    for dtype in (np.dtype(np.uint16), np.dtype(np.uint32)):
        n_tokens = max(0, n_bytes) // dtype.itemsize
        if n_bytes % dtype.itemsize == 0 and start == _header(dtype, n_tokens):
            return np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES, shape=(n_tokens,))
    raise ValueError("its header is not that of its tokens")


def _largest(tokens: npt.NDArray[np.unsignedinteger]) -> int:
    """The largest id, or -1; holds a part of the stream in memory at a time."""
    return max((int(tokens[i : i + _PART].max()) for i in range(0, len(tokens), _PART)), default=-1)


def _check_documents(documents: pa.Table, n_tokens: int) -> None:
    """Raises ValueError unless the documents lie one behind the other and fill the stream."""
    if any(column.null_count for column in documents.columns):
        raise ValueError("values are missing")
    lengths, offsets, n_bytes = (documents.column(name).to_numpy() for name in ("n_tokens", "offset", "n_bytes"))
    if ((lengths < 1) | (lengths > n_tokens) | (n_bytes < 0) | (n_bytes >= 1 << 31)).any():
        raise ValueError("a document has an impossible length")
    ends = lengths.cumsum()
    if (offsets != ends - lengths).any() or (ends[-1] if len(ends) else 0) != n_tokens:
        raise ValueError(f"offsets and lengths do not fill {n_tokens:,} tokens")

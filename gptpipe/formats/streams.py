"""Token streams on disk, data/split: a folder for each of train, val and test.

`tokens.npy` is one flat array of uint16 or uint32 in numpy's file format: the documents one after another, each
with its end-of-text token. It is opened memory-mapped. `documents.parquet` has a row for each document: `id`,
`source`, `offset` (of its first token in the array), `n_tokens` (end-of-text included) and `n_bytes` (of its
text in UTF-8).
"""

import os
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

from gptpipe.base.files import new_file
from gptpipe.base.manifest import Manifest
from gptpipe.base.parquet import ParquetRows, new_parquet, read_parquet, verify_rows
from gptpipe.formats.sides import SIDES, Side
from gptpipe.shell.errors import IntegrityError, first_line

TOKENS = "tokens.npy"
DOCUMENTS = "documents.parquet"
_HEADER_BYTES = 128  # of an .npy file with one dimension
_CHECKED_TOKENS = 1 << 22  # read into memory at once
_MAX_DOCUMENT_BYTES = (1 << 31) - 1
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("offset", pa.int64()),
        ("n_tokens", pa.int64()),
        ("n_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Stream:
    """One side of a split: `tokens` (n_tokens,) stay on disk; `documents` has their rows in order."""

    tokens: npt.NDArray[np.unsignedinteger]
    documents: pd.DataFrame

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents; an end-of-text token has none."""
        return int(self.documents["n_bytes"].sum())


class DocumentsWriter:
    """Appends rows to the table of documents of one side."""

    def __init__(self, rows: ParquetRows) -> None:
        self._rows = rows
        self._n_tokens = 0

    def extend(self, batch: pa.RecordBatch) -> None:
        """Append the documents of a batch of token shards; its column `tokens` is not needed."""
        n_tokens = batch.column("n_tokens").to_numpy()
        offset = self._n_tokens + n_tokens.cumsum() - n_tokens
        columns = [batch.column("id"), batch.column("source"), pa.array(offset), pa.array(n_tokens)]
        self._rows.extend(pa.RecordBatch.from_arrays([*columns, batch.column("n_bytes")], schema=_SCHEMA))
        self._n_tokens += int(n_tokens.sum())


@contextmanager
def new_tokens(folder: Path, dtype: np.dtype[Any], n_tokens: int) -> Iterator[Path]:
    """Write the token array of one side. Yields a file of the final size, whose parts `tokens_at` writes.

    The file gets its name when the block ends without an error.
    """
    n_bytes = _HEADER_BYTES + n_tokens * dtype.itemsize
    with new_file(folder / TOKENS, n_bytes) as file:
        file.write(_header(dtype, n_tokens))
        file.truncate(n_bytes)
        file.flush()
        yield Path(file.name)


@contextmanager
def tokens_at(path: Path, dtype: np.dtype[Any], start: int, n_tokens: int) -> Iterator[BinaryIO]:
    """Write the `n_tokens` tokens from number `start` on of a file of `new_tokens`.

    Other processes write the others. The tokens are on disk when the block ends: the process that made the file
    can be on another machine. Raises ValueError if another number of tokens was written.
    """
    first_byte = _HEADER_BYTES + start * dtype.itemsize
    with path.open("r+b") as file:
        file.seek(first_byte)
        yield file
        n_written = (file.tell() - first_byte) // dtype.itemsize
        if n_written != n_tokens:
            raise ValueError(f"{n_written:,} tokens instead of {n_tokens:,}")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_documents(folder: Path) -> Iterator[DocumentsWriter]:
    """Write the table of documents of one side; it appears when the block ends without an error."""
    with new_parquet(folder / DOCUMENTS, _SCHEMA) as rows:
        yield DocumentsWriter(rows)


def _header(dtype: np.dtype[Any], n_tokens: int) -> bytes:
    """The header of an .npy file. numpy pads it to the same size for every length of the array."""
    file = BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def verify_split(folder: Path) -> Manifest:
    """The manifest of a split, after checking its files and numbers of documents. Raises IntegrityError."""
    return verify_rows(folder, {f"{side}/{DOCUMENTS}": f"{side}_documents" for side in SIDES})


def open_stream(folder: Path, side: Side, vocab_size: int | None = None) -> Stream:
    """One side of the split, its tokens memory-mapped. The caller has verified the folder.

    With a `vocab_size`, reads all tokens once to check that each is below it. Raises IntegrityError for files
    that stage split cannot have written.
    """
    tokens_path = folder / side / TOKENS
    try:
        tokens = _map_tokens(tokens_path)
        if vocab_size is not None:
            _check_tokens(tokens, vocab_size)
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{tokens_path}: not a token stream ({first_line(error)}); run `dvc repro -f`"
        ) from error
    documents_path = folder / side / DOCUMENTS
    try:
        documents = pa.Table.from_batches(read_parquet(documents_path, _SCHEMA.names), _SCHEMA)
        _check_documents(documents, len(tokens))
    except (pa.ArrowException, ValueError) as error:
        reason = first_line(error)
        raise IntegrityError(
            f"{documents_path}: does not fit {TOKENS} ({reason}); run `dvc repro -f`"
        ) from error
    return Stream(tokens, documents.to_pandas())


def _map_tokens(path: Path) -> npt.NDArray[np.unsignedinteger]:
    """The array in an .npy file that `new_tokens` wrote. Raises OSError, ValueError.

    The header is compared with the two possible ones. It is not parsed, because numpy evaluates it as Python.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    n_bytes = path.stat().st_size - _HEADER_BYTES
    for dtype in (np.dtype(np.uint16), np.dtype(np.uint32)):
        n_tokens = max(0, n_bytes) // dtype.itemsize
        if n_bytes % dtype.itemsize == 0 and header == _header(dtype, n_tokens):
            return np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES, shape=(n_tokens,))
    raise ValueError("its header does not match its size")


def _check_tokens(tokens: npt.NDArray[np.unsignedinteger], vocab_size: int) -> None:
    """Raise ValueError if a token is not in the vocabulary; keeps only a part of the stream in memory."""
    for start in range(0, len(tokens), _CHECKED_TOKENS):
        largest = int(tokens[start : start + _CHECKED_TOKENS].max())
        if largest >= vocab_size:
            raise ValueError(f"it contains token {largest:,}, the tokenizer has {vocab_size:,} tokens")


def _check_documents(documents: pa.Table, n_tokens: int) -> None:
    """Raise ValueError unless the documents follow each other without a gap and fill the stream."""
    if any(column.null_count for column in documents.columns):
        raise ValueError("values are missing")
    offsets = documents.column("offset").to_numpy()
    lengths = documents.column("n_tokens").to_numpy()
    n_bytes = documents.column("n_bytes").to_numpy()
    if (lengths < 1).any() or (lengths > n_tokens).any():
        raise ValueError("a document has an impossible number of tokens")
    if (n_bytes < 0).any() or (n_bytes > _MAX_DOCUMENT_BYTES).any():
        raise ValueError("a document has an impossible number of bytes")
    ends = lengths.cumsum()
    if (offsets != ends - lengths).any() or lengths.sum() != n_tokens:
        raise ValueError(f"offsets and lengths do not fill {n_tokens:,} tokens")

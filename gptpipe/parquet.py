"""Parquet shards: written with page checksums, read with them verified, a batch of rows at a time.

Without checksums most single-bit flips in a Parquet file load as wrong values and no error. The footer has none even
so: what this project wrote is checked against its manifest before it is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gptpipe.errors import IntegrityError, first_line
from gptpipe.files import new_file

_READ_ROWS = 1024  # per record batch
_GROUP_ROWS = 65536  # per row group: what a writer holds in memory, at most ...
_GROUP_BYTES = 16 << 20  # ... and about how much of it


class ParquetRows:
    """Takes rows one at a time and writes them in groups."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._rows: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._n_rows = self._n_bytes = 0

    def append(self, row: dict[str, Any], n_bytes: int = 0) -> None:
        """Add a row; `n_bytes` is about what its large values take in memory."""
        self._rows.append(row)
        self._count(1, n_bytes)

    def extend(self, batch: pa.RecordBatch) -> None:
        """Add many rows at once, to a file that nothing is appended to."""
        self._batches.append(batch)
        self._count(len(batch), batch.nbytes)

    def _count(self, n_rows: int, n_bytes: int) -> None:
        self._n_rows, self._n_bytes = self._n_rows + n_rows, self._n_bytes + n_bytes
        if self._n_rows >= _GROUP_ROWS or self._n_bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        assert not (self._rows and self._batches), "a file is made by append or by extend"
        if self._batches:
            table = pa.Table.from_batches(self._batches, self._schema).combine_chunks()
        else:
            table = pa.Table.from_pylist(self._rows, self._schema)
        self._writer.write_table(table)
        self._rows, self._batches, self._n_rows, self._n_bytes = [], [], 0, 0


@contextmanager
def new_parquet(path: Path, schema: pa.Schema) -> Iterator[ParquetRows]:
    """Write a Parquet file that appears whole or not at all. Raises ResourceError."""
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    with new_file(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        rows = ParquetRows(writer, schema)
        yield rows
        rows.flush()


def read_parquet(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of some columns, none larger than a row group. Raises IntegrityError for a damaged file."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if missing := set(columns).difference(file.schema_arrow.names):
                raise KeyError(f"no column {', '.join(sorted(missing))}")
            for group in range(file.num_row_groups):  # a batch that spans groups would hold more than one in memory
                yield from file.iter_batches(_READ_ROWS, [group], columns)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{path}: damaged: {first_line(error)}; make the folder again with `dvc repro -f`"
        ) from error


def strings(batch: pa.RecordBatch, column: str) -> list[str]:
    """A column of text; several times faster than `to_pylist`."""
    values: list[str] = batch.column(column).to_numpy(zero_copy_only=False).tolist()
    return values

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

from gptpipe.base.files import new_file
from gptpipe.base.manifest import Manifest, verify
from gptpipe.shell.errors import IntegrityError, first_line

_READ_ROWS = 8192  # per record batch
GROUP_ROWS = 65536  # per row group: what a writer holds in memory, at most ...
_GROUP_BYTES = 16 << 20  # ... and about how much of it


class ParquetRows:
    """Takes batches of rows and writes them in groups."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._batches: list[pa.RecordBatch] = []
        self._n_rows = self._n_bytes = 0

    def extend(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        self._n_rows, self._n_bytes = self._n_rows + len(batch), self._n_bytes + batch.nbytes
        if self._n_rows >= GROUP_ROWS or self._n_bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._batches, self._schema).combine_chunks())
        self._batches, self._n_rows, self._n_bytes = [], 0, 0


@contextmanager
def new_parquet(path: Path, schema: pa.Schema) -> Iterator[ParquetRows]:
    """Write a Parquet file that appears whole or not at all. Raises ResourceError."""
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": ["source"]}
    if "tokens" in schema.names:  # low and high bytes apart: a fifth smaller, and written in two thirds of the time
        options["column_encoding"] = {"tokens.list.element": "BYTE_STREAM_SPLIT"}
    with new_file(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        rows = ParquetRows(writer, schema)
        yield rows
        rows.flush()


def read_parquet(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of some columns, none larger than a row group. Raises IntegrityError for a damaged file.

    The file is trusted: it is one of this project's shards, compared with its digest before it is read. A hostile file
    could crash native code, and with it this process; files from elsewhere are read by `gptpipe.collect.tables`.
    """
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


def verify_rows(folder: Path, counts: dict[str, str]) -> Manifest:
    """The manifest of a folder, after checking its files, and the rows of its Parquet files against its counts.

    `counts` maps a glob pattern to the name of the count of all rows in the files that match. Raises IntegrityError.
    """
    manifest = verify(folder)
    for pattern, name in counts.items():
        paths = sorted(folder.glob(pattern))
        try:
            n_rows = sum(pq.read_metadata(path).num_rows for path in paths)
        except (pa.ArrowException, OSError) as error:
            raise IntegrityError(f"{folder / pattern}: damaged: {first_line(error)}; run `dvc repro -f`") from error
        if n_rows != manifest.counts.get(name):
            raise IntegrityError(
                f"{folder / pattern}: {n_rows:,} rows, the manifest counts {manifest.counts.get(name)} {name}; "
                "make the folder again with `dvc repro -f`"
            )
    return manifest


def strings(batch: pa.RecordBatch, column: str) -> list[str]:
    """A column of text; several times faster than `to_pylist`."""
    values: list[str] = batch.column(column).to_numpy(zero_copy_only=False).tolist()
    return values

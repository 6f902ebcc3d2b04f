"""Rows of Parquet files and datasets, parsed by native code in a child process that imports only this."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gptpipe.collect.texts import Rejected, Texts
from gptpipe.shell.environment import optional_module
from gptpipe.shell.errors import GptpipeError, InputError, ResourceError, first_line

CHUNK = 1 << 18  # bytes read at once
_BATCH_BYTES = 1 << 20  # about, of rows of Parquet in memory
_MAX_BATCH_ROWS = 1024  # of Parquet
_LIST_ROWS = 64  # of a dataset in a list
_MAX_NAMES = 20  # of columns, in a message
# Options of pyarrow. Without them a row group, which may be the whole file, is in memory at once.
_BOUNDED: dict[str, Any] = {"pre_buffer": False, "buffer_size": CHUNK, "page_checksum_verification": True}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(address: str) -> bool:
    return _SCHEME.match(address) is not None


def parquet_rows(name: str, source: BinaryIO, column: str, errors: str, limit: int, max_expansion: int) -> Texts:
    """The texts of a column. `errors` as in bytes.decode; `limit`: bytes that the file may expand to."""
    try:
        with pq.ParquetFile(source, **_BOUNDED) as file:
            _check_column(name, file.schema_arrow, column)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            check_growth(name, sum(group.total_byte_size for group in groups), limit, max_expansion)
            n_rows = _rows_per_batch(source, column, groups)
            n_out = 0
            row = 0  # number of the last row; the first is 1
            for batch in file.iter_batches(n_rows, columns=[column]):
                contents = batch.column(0).cast(pa.large_binary())  # pyarrow does not check UTF-8
                n_out += contents.nbytes
                check_growth(name, n_out, limit, max_expansion)
                texts: list[str | Rejected] = []
                try:
                    for content in contents.to_numpy(zero_copy_only=False):
                        row += 1
                        if content is None:
                            texts.append(Rejected("no_text", f"{name}, row {row}"))
                        else:
                            texts.append(content.decode(errors=errors))
                except UnicodeDecodeError as error:
                    yield texts  # a limit of the source may end before the error
                    raise not_utf8(f"{name}, column `{column}`, row {row}", error.start) from error
                yield texts
    except (GptpipeError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise not_utf8(f"{name}, the name of a column", error.start) from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"{name}: cannot read: {reason}; fix the file, or collect.sources") from error
    except Exception as error:  # pyarrow raises more than its own exceptions
        raise InputError(f"{name}: not a readable Parquet file: {first_line(error)}; replace the file") from error


def _check_column(name: str, schema: pa.Schema, column: str) -> None:
    """Raise InputError unless the file has the column, and it contains text."""
    if column not in schema.names:
        names = _first_names(schema.names)
        raise InputError(f"{name}: no column `{column}` among {names}; set text_column of the source")
    type_ = schema.field(column).type
    if not (pa.types.is_string(type_) or pa.types.is_large_string(type_)):
        raise InputError(f"{name}: column `{column}` contains {type_}, not text; set text_column of the source")


def _rows_per_batch(source: BinaryIO, column: str, groups: list[Any]) -> int:
    """How many rows fit into about _BATCH_BYTES, even if they are the longest of the file."""
    row_bytes: list[int] = [group.total_byte_size // max(1, group.num_rows) for group in groups]
    longest = max([*row_bytes, _longest_in_dictionaries(source, column, groups)])
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // (longest + 1)))


def _longest_in_dictionaries(source: BinaryIO, column: str, groups: list[Any]) -> int:
    """Bytes of the longest text in a dictionary page: in a small file, a million rows may refer to it."""
    longest = 0
    with pq.ParquetFile(source, read_dictionary=[column], **_BOUNDED) as file:
        for i, group in enumerate(groups):
            has_dictionary = any(group.column(j).has_dictionary_page for j in range(group.num_columns))
            if group.num_rows and has_dictionary:
                dictionary = next(file.iter_batches(1, [i], [column])).column(0).dictionary
                longest_here: int | None = pc.max(pc.binary_length(dictionary)).as_py()
                longest = max(longest, longest_here or 0)
    return longest


def _first_names(names: Iterable[str]) -> str:
    """The first names of columns, for a message."""
    first = list(islice(names, _MAX_NAMES + 1))
    return ", ".join(first[:_MAX_NAMES]) + (", ..." if len(first) > _MAX_NAMES else "")


def dataset_rows(address: str, dataset: str, name: str | None, split: str, revision: str, column: str) -> Texts:
    """The texts of a column of a dataset; `datasets` reads it from Parquet, Arrow and other files."""
    datasets = optional_module("datasets", "huggingface")
    texts: list[str | Rejected] = []
    n_characters = 0
    try:
        with read_errors(address):
            rows = datasets.load_dataset(dataset, name, split=split, revision=revision, streaming=True)
            for row in rows:
                if column not in row:
                    names = _first_names(row)
                    raise InputError(f"{dataset}: no column `{column}` among {names}; set text_column")
                text = row[column]
                texts.append(text if isinstance(text, str) else Rejected("no_text"))
                n_characters += len(text) if isinstance(text, str) else 0
                if len(texts) == _LIST_ROWS or n_characters > CHUNK:
                    yield texts
                    texts, n_characters = [], 0
    except GptpipeError:
        yield texts  # a limit of the source may end before the error
        raise
    yield texts


def not_utf8(name: str, offset: int) -> InputError:
    fix = "convert the file, or set collect.encoding_errors to replace"
    return InputError(f"{name}: not UTF-8 at byte {offset}; {fix}")


def check_growth(name: str, n_out: int, limit: int, max_expansion: int) -> None:
    """Raise InputError if a file expands to more than `limit` bytes."""
    if n_out > limit:
        problem = f"{name}: grows to more than {max_expansion} times its size"
        raise InputError(f"{problem}; remove it, or raise collect.max_expansion")


@contextmanager
def read_errors(name: str) -> Iterator[None]:
    """Turn an error of reading into an InputError, or a ResourceError if a rerun may help."""
    try:
        yield
    except GptpipeError:
        raise
    except MemoryError as error:
        raise ResourceError(f"{name}: not enough memory to read it; free memory, then rerun") from error
    except Exception as error:  # each file system of fsspec raises other classes
        if not isinstance(error, OSError) and not is_remote(name):
            raise
        # fsspec raises FileNotFoundError also for an unreachable host and for a server that fails.
        cause: Any = (isinstance(error, FileNotFoundError) and error.__cause__) or error
        is_unreachable = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | PermissionError)
        has_failed = getattr(cause, "status", 0) in (408, 429, *range(500, 600))
        if is_remote(name) and (is_unreachable or has_failed or not isinstance(error, OSError)):
            raise ResourceError(f"{name}: cannot read: {first_line(cause)}; rerun when it can be reached") from error
        reason = (cause.strerror if isinstance(cause, OSError) else None) or first_line(cause)
        raise InputError(f"{name}: cannot read: {reason}; fix the file, or collect.sources") from error

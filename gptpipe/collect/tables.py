"""Rows of Parquet files and of datasets, parsed by native code. Runs in a process of its own, so it imports little."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gptpipe.collect.batch import Rejected
from gptpipe.shell.environment import optional_module
from gptpipe.shell.errors import GptpipeError, InputError, ResourceError, first_line

CHUNK = 1 << 18  # bytes read at once
_BATCH_BYTES = 1 << 20  # of rows of Parquet in memory, about
_ROWS = 64  # of a dataset, passed on together
_NAMES = 20  # of columns, in a message
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

# Texts, and a Rejected in place of each that is not one; never raised here, so the stream goes on behind it.
Texts = Iterator[Sequence[str | Rejected]]


def is_remote(address: str) -> bool:
    return _SCHEME.match(address) is not None


def parquet_rows(name: str, whole: BinaryIO, column: str, errors: str, limit: int, max_expansion: int) -> Texts:
    """The texts of a column of a Parquet file. `errors`: as in bytes.decode; `limit`: bytes that may come out."""
    row = 0  # the first is 1
    # Without these a row group, which may be the whole file, would be in memory at once.
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": CHUNK, "page_checksum_verification": True}
    try:
        with pq.ParquetFile(whole, **options) as file:
            if column not in file.schema_arrow.names:
                names = _some_of(file.schema_arrow.names)
                raise InputError(f"{name}: no column `{column}` among {names}; set text_column of the source")
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{name}: column `{column}` holds {kind}, not text; set text_column of the source")
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            n_out = sum(group.total_byte_size for group in groups)
            check_growth(name, n_out, limit, max_expansion)
            widest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
            widest, n_out = max(widest, _longest_in_dictionaries(whole, column, groups, options)), 0
            n_rows = max(1, min(1024, _BATCH_BYTES // (widest + 1)))
            for batch in file.iter_batches(n_rows, columns=[column]):
                contents = batch.column(0).cast(pa.large_binary())  # Parquet does not check UTF-8
                n_out += contents.nbytes
                check_growth(name, n_out, limit, max_expansion)
                texts: list[str | Rejected] = []
                try:
                    for content in contents.to_numpy(zero_copy_only=False):
                        row += 1
                        texts.append(Rejected("no_text", f"{name}, row {row}") if content is None
                                     else content.decode(errors=errors))  # fmt: skip
                except UnicodeDecodeError as error:
                    yield texts
                    raise not_utf8(f"{name}, column `{column}`, row {row}", error.start) from error
                yield texts
    except (GptpipeError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise not_utf8(f"{name}, the name of a column", error.start) from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"{name}: cannot read: {reason}; mend the file, or collect.sources") from error
    except Exception as error:  # pyarrow has others than its own
        raise InputError(f"{name}: not a readable Parquet file: {first_line(error)}; replace the file") from error


def _longest_in_dictionaries(whole: BinaryIO, column: str, groups: list[Any], options: dict[str, Any]) -> int:
    """Bytes of the longest text that a row can name by a number: a small file may have it in a million rows."""
    with pq.ParquetFile(whole, read_dictionary=[column], **options) as file:
        some = (i for i, group in enumerate(groups) if group.num_rows
                and any(group.column(j).has_dictionary_page for j in range(group.num_columns)))  # fmt: skip
        texts = (next(file.iter_batches(1, [i], [column])).column(0).dictionary for i in some)
        return max((pc.max(pc.binary_length(text)).as_py() or 0 for text in texts), default=0)


def _some_of(names: Iterable[str]) -> str:
    """The first names of columns, for a message."""
    first = list(islice(names, _NAMES + 1))
    return ", ".join(first[:_NAMES]) + (", ..." if len(first) > _NAMES else "")


def dataset_rows(address: str, dataset: str, name: str | None, split: str, revision: str, column: str) -> Texts:
    """The texts of a column of a dataset, which `datasets` reads from Parquet, Arrow and other files."""
    datasets = optional_module("datasets", "huggingface")
    texts: list[str | Rejected] = []
    size = 0
    try:
        with read_errors(address):
            rows = datasets.load_dataset(dataset, name, split=split, revision=revision, streaming=True)
            for row in rows:
                if column not in row:
                    names = _some_of(row)
                    raise InputError(f"{dataset}: no column `{column}` among {names}; set text_column")
                text = row[column]
                texts.append(text if isinstance(text, str) else Rejected("no_text"))
                size += len(text) if isinstance(text, str) else 0
                if len(texts) == _ROWS or size > CHUNK:
                    yield texts
                    texts, size = [], 0
    except GptpipeError:
        yield texts  # a limit may lie before the error
        raise
    yield texts


def not_utf8(name: str, offset: int) -> InputError:
    mend = "convert the file, or set collect.encoding_errors to replace"
    return InputError(f"{name}: not UTF-8 at byte {offset}; {mend}")


def check_growth(name: str, n_out: int, limit: int, max_expansion: int) -> None:
    """Raise InputError if more bytes come out than `growth_limit` allows."""
    if n_out > limit:
        raise InputError(f"{name}: grows to more than {max_expansion} times its size; remove it, or raise "
                         "collect.max_expansion")  # fmt: skip


@contextmanager
def read_errors(name: str) -> Iterator[None]:
    """Turn what reading can raise into one line."""
    try:
        yield
    except GptpipeError:
        raise
    except MemoryError as error:
        raise ResourceError(f"{name}: not enough memory to read it; free memory, then rerun") from error
    except Exception as error:  # every file system behind fsspec has errors of its own
        if not isinstance(error, OSError) and not is_remote(name):
            raise
        # fsspec says of a host that cannot be reached, and of a server that fails, too, that the file is not there.
        cause: Any = (isinstance(error, FileNotFoundError) and error.__cause__) or error
        is_lost = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | PermissionError)
        is_lost = is_lost or getattr(cause, "status", 0) in (408, 429, *range(500, 600))
        if is_remote(name) and (is_lost or not isinstance(error, OSError)):
            raise ResourceError(f"{name}: cannot read: {first_line(cause)}; rerun when it can be reached") from error
        reason = (cause.strerror if isinstance(cause, OSError) else None) or first_line(cause)
        raise InputError(f"{name}: cannot read: {reason}; mend the file, or collect.sources") from error

"""Rows of Parquet files and datasets, parsed by native code, which runs in a worker process."""

import codecs
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from math import inf
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gptpipe.collect.cleaning import cut
from gptpipe.collect.encodings import SAMPLE_BYTES, looks_binary, wide_encoding
from gptpipe.collect.keys import MISSING, paths_of_keys, value_at
from gptpipe.collect.texts import Piece, Rejected, Texts
from gptpipe.shell.environment import optional_module
from gptpipe.shell.errors import GptpipeError, InputError, ResourceError, first_line

CHUNK = 1 << 18  # bytes read at once
_BATCH_BYTES = 1 << 20  # about, of rows of Parquet in memory
_MAX_BATCH_ROWS = 1024  # of Parquet
_LIST_ROWS = 64  # of a dataset in a list
_MAX_NAMES = 20  # of columns, in a message
# Options of pyarrow. Without them a row group, which may be the whole file, is in memory at once.
_BOUNDED: dict[str, Any] = {"pre_buffer": False, "buffer_size": CHUNK, "page_checksum_verification": True}
_DICTIONARY_BYTES = 16 << 20  # of a dictionary page that is read to find its longest text
_HEADER_OF_PAGE = re.compile(rb"\x15[\x80-\xff]*[\0-\x7f]\x15([\x80-\xff]*[\0-\x7f])", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(address: str) -> bool:
    return _SCHEME.match(address) is not None


def parquet_rows(
    name: str,
    source: BinaryIO,
    column: str,
    errors: str,
    limit: int,
    max_expansion: int,
    max_document_bytes: int | None = None,
    start: int = 0,
    end: int | None = None,
) -> Texts:
    """The texts of a column, or of a field of a column of structs (`a.b`).

    `errors` as in bytes.decode; `limit`: bytes that the file may expand to. If `max_document_bytes` is given, a
    longer text is cut while it is decoded.

    `start` and `end` divide a file: only row groups are read whose first byte is at an offset from `start` up
    to, and without, `end` (None: the end of the file). Messages count rows from the start of the file.
    """
    try:
        with pq.ParquetFile(source, **_BOUNDED) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            check_growth(name, sum(group.total_byte_size for group in groups), limit, max_expansion)
            _check_column(name, file.schema_arrow, column, groups)
            n_rows = _rows_per_batch(source, column, groups)
            n_out = 0
            for numbers, row in _runs(groups, start, end):
                for batch in file.iter_batches(n_rows, numbers, [column]):
                    contents = _contents(batch, column)
                    n_out += contents.nbytes
                    check_growth(name, n_out, limit, max_expansion)
                    yield from _texts(name, column, row, contents, errors, max_document_bytes)
                    row += len(contents)
    except (GptpipeError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: the name of a column is not UTF-8; write the file again") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"{name}: cannot read: {reason}; fix the file, or collect.sources") from error
    except Exception as error:  # pyarrow raises more than its own exceptions
        raise InputError(
            f"{name}: not a readable Parquet file: {first_line(error)}; replace the file"
        ) from error


def _runs(groups: list[Any], start: int, end: int | None) -> Iterator[tuple[list[int], int]]:
    """The row groups in the range: numbers of neighbours, and how many rows are before the first of them."""
    n_before = list(accumulate([0, *(group.num_rows for group in groups)]))
    run: list[int] = []
    for i, group in enumerate(groups):
        offset = _first_byte(group)
        # A damaged file may have negative offsets: each group must be in one range.
        if (start == 0 or offset >= start) and offset < (inf if end is None else end):
            run.append(i)
        elif run:
            yield run, n_before[run[0]]
            run = []
    if run:
        yield run, n_before[run[0]]


def _first_byte(group: Any) -> int:
    """The offset in the file of the first page of a row group."""
    offsets: list[int] = []
    for j in range(group.num_columns):
        chunk = group.column(j)
        first = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
        offsets.append(chunk.data_page_offset if first is None else first)
    return min(offsets, default=0)


def _contents(batch: pa.RecordBatch, column: str) -> Any:
    """The texts of a batch as UTF-8, in one buffer. pyarrow does not check that it is UTF-8."""
    values = _values(batch, column)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if not _is_text(values.type):  # a column of another type, without any value
        values = pa.nulls(len(values))
    return values.cast(pa.large_binary())


def _values(batch: pa.RecordBatch, column: str) -> Any:
    """A column, or a field of a column of structs."""
    top, *names = _path(batch.schema, column)
    values = batch.column(batch.schema.get_field_index(top))
    for name in names:
        values = pc.struct_field(values, name)
    return values


def _path(fields: Iterable[pa.Field], column: str) -> list[str]:
    """The names from a column to the field that `a.b` means; [] if there is none. A name may contain a dot."""
    fields = list(fields)
    if any(field.name == column for field in fields):
        return [column]
    for field in fields:
        if pa.types.is_struct(field.type) and column.startswith(f"{field.name}."):
            path = _path(field.type, column.removeprefix(f"{field.name}."))
            if path:
                return [field.name, *path]
    return []


def _texts(name: str, column: str, n_before: int, contents: Any, errors: str, max_bytes: int | None) -> Texts:
    """The texts of a batch; `n_before` is the number of rows before it."""
    texts: list[str | Rejected] = []
    has_long = max_bytes is not None and contents.nbytes > max_bytes
    values = _views(contents) if has_long else contents.to_numpy(zero_copy_only=False)
    for row, content in enumerate(values, n_before + 1):
        try:
            if content is None:
                texts.append(Rejected("no_text", f"{name}, row {row}"))
            elif max_bytes is not None and len(content) > max_bytes:
                yield texts
                texts = []
                yield from _pieces(content, errors, max_bytes)
            else:
                texts.append(_decoded(bytes(content), errors))
        except UnicodeDecodeError as error:
            texts.append(Rejected("not_utf8", _not_utf8(f"{name}, column `{column}`, row {row}", error)))
    yield texts


def _decoded(content: bytes, errors: str) -> str:
    """The text of a cell. Raises UnicodeDecodeError."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode(errors=_errors_of(content, errors))


def _errors_of(start: bytes, errors: str) -> str:
    """How to treat bytes that are not UTF-8: replacing them makes no text of UTF-16 or compressed data."""
    return "strict" if wide_encoding(start) or looks_binary(start) else errors


def _views(contents: Any) -> Iterator[memoryview | None]:
    """The texts of an array of large_binary, without copies."""
    is_null = contents.is_null().to_numpy(zero_copy_only=False)
    _, offsets, data = contents.buffers()
    view = memoryview(b"" if data is None else data)
    ends = memoryview(offsets).cast("q")[contents.offset : contents.offset + len(contents) + 1]
    for i in range(len(contents)):
        yield None if is_null[i] else view[ends[i] : ends[i + 1]]


def _pieces(content: memoryview, errors: str, max_bytes: int) -> Texts:
    """A long text in pieces as `cut` makes them. Only a chunk of it is decoded at a time."""
    errors = _errors_of(bytes(content[:SAMPLE_BYTES]), errors)
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    rest = ""
    is_first = True
    for first in range(0, len(content), max_bytes):
        chunk = content[first : first + max_bytes]
        n_waiting = len(decoder.getstate()[0])
        try:
            rest += decoder.decode(chunk, final=first + max_bytes >= len(content))
        except UnicodeDecodeError as error:
            error.start += first - n_waiting
            raise
        *pieces, rest = cut(rest, max_bytes)
        for piece in pieces:
            yield [piece if is_first else Piece(piece)]
            is_first = False
    yield [rest if is_first else Piece(rest)]


def _check_column(name: str, schema: pa.Schema, column: str, groups: list[Any]) -> None:
    """Raise InputError unless the file has the column once, and it contains text, or no value at all."""
    path = _path(schema, column)
    top = path[0] if path else column.split(".")[0]
    if schema.names.count(top) > 1:
        raise InputError(f"{name}: {schema.names.count(top)} columns `{top}`; rename all but one")
    leaves = Counter(_leaves(schema))
    if leaves[column] > 1 and column not in schema.names:
        raise InputError(f"{name}: {leaves[column]} fields `{column}`; rename all but one")
    if not path:
        problem = f"no column `{column}` among {_first_names(leaves)}"
        type_ = schema.field(top).type if top in schema.names else pa.null()
        if pa.types.is_nested(type_) and not pa.types.is_struct(type_):  # a list
            problem = f"column `{top}` contains {type_}, not structs"
        raise InputError(f"{name}: {problem}; set text_column of the source")
    type_ = schema.field(top).type
    for field in path[1:]:
        type_ = type_.field(field).type
    if pa.types.is_struct(type_):
        fields = _first_names(f"{column}.{child.name}" for child in type_)
        raise InputError(
            f"{name}: column `{column}` is a struct; set text_column of the source to one of {fields}"
        )
    type_ = getattr(type_, "storage_type", type_)
    if not (_is_text(type_) or pa.types.is_null(type_) or _is_without_values(column, groups)):
        raise InputError(f"{name}: column `{column}` contains {type_}, not text; set text_column of the source")


def _leaves(schema: pa.Schema) -> Iterator[str]:
    """Names of the columns; for a column of structs, those of its fields, as in `a.b`."""
    for field in schema:
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{name}" for name in _leaves(pa.schema(list(field.type))))
        else:
            yield field.name


def _is_text(type_: pa.DataType) -> bool:
    """Whether values are text, or bytes that may be text."""
    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    kinds = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
    )
    return any(is_kind(type_) for is_kind in kinds)


def _is_without_values(column: str, groups: list[Any]) -> bool:
    """Whether the statistics say that each row is null. Writers give a column without values any type."""
    for group in groups:
        chunks = [group.column(j) for j in range(group.num_columns)]
        own = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]
        statistics = own[0].statistics if own else None
        if statistics is None or not statistics.has_null_count or statistics.null_count != group.num_rows:
            return False
    return True


def _rows_per_batch(source: BinaryIO, column: str, groups: list[Any]) -> int:
    """How many rows fit into about _BATCH_BYTES, even if they are the longest of the file."""
    row_bytes: list[int] = [group.total_byte_size // max(1, group.num_rows) for group in groups]
    longest = max([*row_bytes, _longest_in_dictionaries(source, column, groups)])
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // (longest + 1)))


def _longest_in_dictionaries(source: BinaryIO, column: str, groups: list[Any]) -> int:
    """Bytes of the longest text in a dictionary page: in a small file, a million rows may refer to it.

    At least that: a large page is not read, because its texts would be in memory several times.
    """
    longest = 0
    paths = {group.column(j).path_in_schema for group in groups for j in range(group.num_columns)}
    if column not in paths:  # a list without any value
        return 0
    with pq.ParquetFile(source, read_dictionary=[column], **_BOUNDED) as file:
        for i, group in enumerate(groups):
            chunks = [group.column(j) for j in range(group.num_columns)]
            chunk = next((chunk for chunk in chunks if chunk.path_in_schema == column), None)
            if chunk is None or not group.num_rows or not chunk.has_dictionary_page:
                continue
            page_bytes = _page_bytes(source, chunk.dictionary_page_offset)
            if page_bytes > _DICTIONARY_BYTES:
                return page_bytes
            longest = max(longest, _longest_in_dictionary(file, i, column) or 0)
    return longest


def _longest_in_dictionary(file: Any, group: int, column: str) -> int | None:
    values = _values(next(file.iter_batches(1, [group], [column])), column)
    if not pa.types.is_dictionary(values.type):
        return _DICTIONARY_BYTES
    longest: int | None = pc.max(pc.binary_length(values.dictionary.cast(pa.large_binary()))).as_py()
    return longest


def _page_bytes(source: BinaryIO, offset: int) -> int:
    """The size of a page after decompression, which its header names; a large number if it is not there.

    The header is a struct in Thrift's compact protocol: field 1 is the type of the page, field 2 is this size;
    each is a byte 0x15 (next field, 32-bit integer) and a number in groups of seven bits, with its sign in the
    last bit.
    """
    source.seek(offset)
    fields = _HEADER_OF_PAGE.match(source.read(16))
    if not fields:
        return sys.maxsize
    number = 0
    for byte in reversed(fields[1]):
        number = number << 7 | byte & 0x7F
    return number >> 1


def _first_names(names: Iterable[str]) -> str:
    """The first names of columns, for a message."""
    first = list(islice(names, _MAX_NAMES + 1))
    return ", ".join(first[:_MAX_NAMES]) + (", ..." if len(first) > _MAX_NAMES else "")


class DatasetName(NamedTuple):
    """One split of a dataset of the hub, or of a local folder."""

    address: str  # for messages
    dataset: str
    name: str | None  # of its configuration
    split: str
    revision: str | None


def dataset_shards(source: DatasetName) -> int:
    """The number of files that the dataset is read from."""
    optional_module("datasets", "huggingface")  # an error of its import is not one of the user's data
    with read_errors(source.address), _dataset_errors(source.address):
        return max(1, int(_dataset(source).num_shards))


def dataset_rows(source: DatasetName, column: str, shard: int, n_shards: int) -> Texts:
    """The texts of a column in a shard of a dataset; `datasets` reads Parquet, Arrow and other files."""
    texts: list[str | Rejected] = []
    n_characters = 0
    try:
        with read_errors(source.address), _dataset_errors(source.address):
            for row in _dataset(source).shard(n_shards, shard):
                text = value_at(row, column)
                if text is MISSING:
                    names = _first_names(paths_of_keys(row))
                    raise InputError(f"{source.dataset}: no column `{column}` among {names}; set text_column")
                texts.append(text if isinstance(text, str) else Rejected("no_text"))
                n_characters += len(text) if isinstance(text, str) else 0
                if len(texts) == _LIST_ROWS or n_characters > CHUNK:
                    yield texts
                    texts, n_characters = [], 0
    except GptpipeError:
        yield texts  # a limit of the source may end before the error
        raise
    yield texts


def _dataset(source: DatasetName) -> Any:
    """The rows as an IterableDataset."""
    datasets = optional_module("datasets", "huggingface")
    if any(Path(source.dataset, state).is_file() for state in ("state.json", "dataset_dict.json")):
        problem = f"{source.dataset}: a folder of save_to_disk, which only load_from_disk reads"
        raise InputError(f"{problem}; write the dataset with to_parquet, and use it with kind: parquet")
    return datasets.load_dataset(
        source.dataset, source.name, split=source.split, revision=source.revision, streaming=True
    )


@contextmanager
def _dataset_errors(address: str) -> Iterator[None]:
    """Turn an error of `datasets` that is not of the connection into an InputError, such as a wrong split."""
    try:
        yield
    except (GptpipeError, MemoryError):
        raise
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError)  # also of a dataset that the hub does not have
        if isinstance(error, OSError) and not is_missing:
            raise
        problem = f"{address}: {first_line(error)}"
        raise InputError(f"{problem}; fix dataset, name, split or revision, or the files") from error


def _not_utf8(name: str, error: UnicodeDecodeError) -> str:
    """What is wrong with a cell."""
    problem = f"{name}: not UTF-8 at byte {error.start}"
    if encoding := wide_encoding(error.object):
        return f"{problem}; it is {encoding.upper()}: convert the column"
    if looks_binary(error.object):
        return f"{problem}; it looks compressed or binary: convert the column, or name another"
    return f"{problem}; convert the column, or set collect.encoding_errors to replace"


class TooLargeError(InputError):
    """A file expands to more than it may. The rest of its archive is not read either: it may be a bomb."""


def check_growth(name: str, n_out: int, limit: int, max_expansion: int) -> None:
    """Raise TooLargeError if a file expands to more than `limit` bytes."""
    if n_out > limit:
        problem = f"{name}: grows to more than {max_expansion} times its size"
        raise TooLargeError(f"{problem}; remove it, or raise collect.max_expansion")


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
        is_refused = isinstance(cause, FileNotFoundError | PermissionError)
        is_unreachable = isinstance(cause, OSError) and not is_refused
        has_failed = getattr(cause, "status", 0) in (408, 429, *range(500, 600))
        if is_remote(name) and (is_unreachable or has_failed or not isinstance(error, OSError)):
            raise ResourceError(
                f"{name}: cannot read: {first_line(cause)}; rerun when it can be reached"
            ) from error
        reason = (cause.strerror if isinstance(cause, OSError) else None) or first_line(cause)
        raise InputError(f"{name}: cannot read: {reason}; fix the file, or collect.sources") from error

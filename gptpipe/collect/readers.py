"""Reads the raw texts of one part of a source, in a fixed order.

Memory holds one chunk or document of a text file, one line of JSON, or one batch of rows of Parquet.
"""

import io
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from gptpipe.base.limits import hidden_stderr, memory_limit, time_limit
from gptpipe.base.parallel import map_in_order
from gptpipe.collect.cleaning import cut_text
from gptpipe.collect.encodings import looks_binary, marked_encoding, not_utf8, wide_encoding
from gptpipe.collect.file_kinds import is_text
from gptpipe.collect.jsonl import jsonl_texts
from gptpipe.collect.open_files import growth_limit, open_files
from gptpipe.collect.params import CollectParams, HuggingFace, Jsonl, Parquet, Python, Source, Text, Url
from gptpipe.collect.python_text import python_code, python_docs
from gptpipe.collect.ranges import is_zip, open_range
from gptpipe.collect.streams import seekable
from gptpipe.collect.tables import (
    DatasetName,
    TooLargeError,
    dataset_rows,
    dataset_shards,
    parquet_rows,
    read_errors,
)
from gptpipe.collect.text_files import as_utf8, separator_of, text_documents
from gptpipe.collect.texts import Piece, Rejected, Texts, contains_rejected, lengths
from gptpipe.shell.errors import InputError

_MEMORY = 1 << 30  # bytes that reading a Parquet file may use ...
_MEMORY_PER_BYTE = 16  # ... and these for each byte of the file
_SECONDS = 300.0  # without a list of texts from native code
_HEAD_BYTES = 8192  # of a file, which show whether it is text
FileSource = Text | Jsonl | Parquet | Url


class PartToRead(Protocol):
    """The fields of `gptpipe.collect.parts.Part` that say what to read."""

    @property
    def addresses(self) -> tuple[str, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int | None: ...


def read_part(part: PartToRead, source: Source, params: CollectParams, digests: dict[str, str]) -> Texts:
    """The texts of a part. Longer texts are cut into pieces of at most `max_document_bytes`.

    A file that cannot be read further ends with a bad `Rejected`. So does a file with a bad record, unless the
    source has `on_bad: skip`. The SHA-256 of remote files is added to `digests`. Raises ResourceError if a file
    cannot be reached.
    """
    n_always_fit = params.max_document_bytes // 4  # characters, of at most 4 bytes each
    for texts in _texts_of_part(part, source, params, digests):
        n_characters = lengths(texts)
        if max(n_characters, default=0) <= n_always_fit:
            yield texts
            continue
        for text, n in zip(texts, n_characters, strict=True):
            yield (
                cut_text(text, params.max_document_bytes)
                if isinstance(text, str) and n > n_always_fit
                else [text]
            )


def _texts_of_part(part: PartToRead, source: Source, params: CollectParams, digests: dict[str, str]) -> Texts:
    match source:
        case Python():
            read_package = python_docs if source.kind == "python-docs" else python_code
            yield from ([text] for text in read_package(source.package))
        case HuggingFace():
            assert part.end is not None  # the number of shards
            rows = dataset_rows(dataset_name(source), source.text_column, part.start, part.end)
            yield from _until_bad(_guarded(source.address, rows, memory=None), source)
        case _:
            for address in part.addresses:
                yield from _until_bad(_file(address, part, source, params, digests), source)


def _until_bad(lists: Texts, source: Source) -> Texts:
    """The texts up to the first bad record, or all for `on_bad: skip`. An InputError becomes a bad record."""
    try:
        for texts in lists:
            if source.on_bad == "stop" and contains_rejected(texts):
                for i, text in enumerate(texts):
                    if isinstance(text, Rejected) and text.is_bad:
                        yield texts[: i + 1]
                        return
            yield texts
    except InputError as error:
        yield [Rejected("unreadable", str(error))]


def _of_member(lists: Texts) -> Texts:
    """The texts of a file in an archive. A damaged one ends with a bad record; the others are still read."""
    try:
        yield from lists
    except TooLargeError:
        raise
    except InputError as error:
        yield [Rejected("unreadable", str(error))]


def n_dataset_shards(source: HuggingFace) -> int:
    """Number of files of a dataset, each of which can be read alone. Raises InputError, ResourceError."""
    (n_shards,) = map_in_order(
        dataset_shards, [dataset_name(source)], local=True, isolate=True, parses=_address_of
    )
    return n_shards


def _address_of(name: DatasetName) -> str:
    return name.address


def needs_worker(source: Source) -> bool:
    """Whether native code, which may crash, parses the files of a source."""
    return isinstance(source, Parquet | HuggingFace) or (isinstance(source, Url) and source.format == "parquet")


def _guarded(name: str, lists: Texts, memory: int | None) -> Texts:
    """The texts of a native parser. For each list it may take _SECONDS, and `memory` bytes more than it has.

    This process is a worker of `map_in_order`, because it ends if the parser crashes. The limits do not apply
    to what is done with the texts, whose errors would not name the file.
    """
    while True:
        with hidden_stderr(), memory_limit(name, memory), time_limit(_SECONDS):
            texts = next(lists, None)
        if texts is None:
            return
        yield texts


def dataset_name(source: HuggingFace) -> DatasetName:
    return DatasetName(source.address, source.dataset, source.name, source.split, source.revision)


def _file(
    address: str, part: PartToRead, source: FileSource, params: CollectParams, digests: dict[str, str]
) -> Texts:
    """The texts of a file, of all files in an archive, or of a byte range of either."""
    is_whole = part.start == 0 and part.end is None
    with read_errors(address):
        if is_whole or is_zip(address):
            files = open_files(
                address,
                params.max_expansion,
                digests,
                format_=source.format,
                members=source.members,
                start=part.start,
                end=part.end,
            )
            for name, file in files:
                if isinstance(file, Rejected):
                    yield [file]
                else:
                    yield from _of_member(_content(name, file, 0, source, params))
        elif isinstance(source, Parquet) or (isinstance(source, Url) and source.format == "parquet"):
            with Path(address).open("rb") as file:
                yield from _parquet_file(address, file, source, params, part.start, part.end)
        else:
            with open_range(address, part.start, part.end, separator_of(source) or "\n") as (first_byte, file):
                is_continued = first_byte > 0 and source.format == "text" and separator_of(source) is None
                for texts in _content(address, file, first_byte, source, params, is_whole=False):
                    yield [Piece(texts[0]), *texts[1:]] if is_continued and texts else texts
                    is_continued = is_continued and not texts


def _content(
    name: str,
    file: io.BufferedReader,
    first_byte: int,
    source: FileSource,
    params: CollectParams,
    *,
    is_whole: bool = True,
) -> Texts:
    """The texts of an unpacked file, or of a range of it. `first_byte` is where `file` begins in it."""
    match source:
        case Parquet() | Url(format="parquet"):
            yield from _parquet_file(name, file, source, params)
        case Jsonl(text_key=key) | Url(format="jsonl", text_key=key):
            content = as_utf8(name, file, source, params)
            yield from jsonl_texts(name, content, first_byte, key, params, is_whole=is_whole)
        case Text() | Url():
            head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            is_wide = source.encoding.startswith(("utf-16", "utf-32"))
            if not is_wide and (rejected := _without_text(name, head, params)):
                yield [rejected]
                return
            content = as_utf8(name, file, source, params)
            yield from text_documents(name, content, first_byte, source, params)


def _without_text(name: str, head: bytes, params: CollectParams) -> Rejected | None:
    """Why a file that starts with `head` is not read in an encoding of bytes; None if it may be text."""
    if marked_encoding(head) or is_text(head):
        return None
    if wide_encoding(head):
        return Rejected("not_utf8", str(not_utf8(name, 0, head)))
    if b"\0" in head or (params.encoding_errors == "replace" and looks_binary(head)):
        is_parquet = head.startswith(b"PAR1")
        problem = "a Parquet file; set kind: parquet" if is_parquet else "not text; convert or remove it"
        return Rejected("binary", f"{name}: {problem}")
    return None


def _parquet_file(
    name: str,
    file: BinaryIO,
    source: Parquet | Url,
    params: CollectParams,
    start: int = 0,
    end: int | None = None,
) -> Texts:
    column = source.text_column if isinstance(source, Parquet) else source.text_key
    with seekable(file) as content:
        n_in = content.seek(0, os.SEEK_END)
        limits = (growth_limit(n_in, params.max_expansion), params.max_expansion, params.max_document_bytes)
        rows = parquet_rows(name, content, column, params.encoding_errors, *limits, start, end)
        yield from _guarded(name, rows, _MEMORY + _MEMORY_PER_BYTE * n_in)

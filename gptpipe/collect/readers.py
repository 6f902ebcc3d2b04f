"""Reads the raw texts of one part of a source, in a fixed order.

Memory holds one chunk or document of a text file, one line of JSON, or one batch of rows of Parquet.
"""

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from gptpipe.base.isolated import OpenFile, isolated
from gptpipe.collect.cleaning import cut, plain_line_ends
from gptpipe.collect.open_files import _COMPRESSED, growth_limit, open_files, seekable
from gptpipe.collect.params import CollectParams, Files, HuggingFace, Jsonl, Parquet, Python, Source, Text, Url
from gptpipe.collect.python_text import python_code, python_docs
from gptpipe.collect.tables import CHUNK, dataset_rows, not_utf8, parquet_rows, read_errors
from gptpipe.collect.texts import Piece, Rejected, Texts
from gptpipe.shell.errors import InputError

_MEMORY = 1 << 30  # bytes that reading a Parquet file may use ...
_MEMORY_PER_BYTE = 16  # ... and these for each byte of the file
_HEAD_BYTES = 8192  # of a file, which show whether it is text
_LINE_BYTES = 64 << 20  # of a line of JSON, and 16 times `max_document_bytes` more; it is in memory as a whole
_MAX_KEYS = 10  # of a JSON object, in a message
_INVALID_BYTE = re.compile("[\udc80-\udcff]")  # as `surrogateescape` decodes it
_JSON = json.JSONDecoder(parse_int=str)  # Python refuses to convert integers of more than 4,300 digits
# Byte order marks and their encodings; UTF-32's little-endian mark starts with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


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

    A file that cannot be read further ends with a bad `Rejected`. So does a file with a bad record, unless the source
    has `on_bad: skip`. The SHA-256 of remote files is added to `digests`. Raises ResourceError if a file cannot be
    reached.
    """
    n_always_fit = params.max_document_bytes // 4  # characters, of at most 4 bytes each
    for texts in _texts_of_part(part, source, params, digests):
        start = 0
        for i, text in enumerate(texts):
            if isinstance(text, str) and len(text) > n_always_fit:
                yield texts[start:i]
                yield _pieces(text, params)
                start = i + 1
        yield texts[start:]


def _pieces(text: str, params: CollectParams) -> list[str]:
    """The text cut into pieces, each but the first marked as one."""
    first, *others = cut(text, params.max_document_bytes) or [text]
    return [type(text)(first), *map(Piece, others)]


def _texts_of_part(part: PartToRead, source: Source, params: CollectParams, digests: dict[str, str]) -> Texts:
    match source:
        case Python():
            read_package = python_docs if source.kind == "python-docs" else python_code
            yield from ([text] for text in read_package(source.package))
        case HuggingFace():
            yield from _until_bad(_dataset(part, source), source)
        case _:
            for address in part.addresses:
                yield from _until_bad(_file(address, part, source, params, digests), source)


def _until_bad(lists: Texts, source: Source) -> Texts:
    """The texts up to the first bad record, or all for `on_bad: skip`. An InputError becomes a bad record."""
    try:
        for texts in lists:
            if source.on_bad == "stop":
                for i, text in enumerate(texts):
                    if isinstance(text, Rejected) and text.is_bad:
                        yield texts[: i + 1]
                        return
            yield texts
    except InputError as error:
        yield [Rejected("unreadable", str(error))]


def _dataset(part: PartToRead, source: HuggingFace) -> Texts:
    arguments = (source.dataset, source.name, source.split, source.revision, source.text_column)
    yield from isolated(source.address, dataset_rows, source.address, *arguments)


def n_dataset_shards(source: HuggingFace) -> int:
    """Number of files of a dataset, each of which can be read alone."""
    return 1


def is_other_file(name: str, source: Source) -> bool:
    """Whether a name says that the file has another format than the source."""
    return False


def _file(address: str, part: PartToRead, source: Source, params: CollectParams, digests: dict[str, str]) -> Texts:
    """The texts of a file, or of all files in an archive."""
    if part.start or part.end is not None:
        yield from _range_of_file(address, part, source, params)
        return
    with read_errors(address):
        for name, file in open_files(address, params.max_expansion, digests):
            yield from _content(name, file, 0, source, params)


def _range_of_file(address: str, part: PartToRead, source: Source, params: CollectParams) -> Texts:
    """The documents that begin in a byte range of a plain file."""
    separator = (_separator(source) or "\n").encode()
    with read_errors(address), Path(address).open("rb") as file:
        start, end = (_boundary(file, offset, separator) for offset in (part.start, part.end))
        file.seek(start)
        content: io.BufferedReader = io.BufferedReader(_Slice(file, end - start), CHUNK)
        for texts in _content(address, content, start, source, params):
            is_continued = start and texts and isinstance(source, Text) and source.document == "file"
            yield [Piece(texts[0]), *texts[1:]] if is_continued else texts


def _content(name: str, file: io.BufferedReader, start: int, source: Source, params: CollectParams) -> Texts:
    match source:
        case Parquet(text_column=column) | Url(format="parquet", text_key=column):
            yield from _parquet_file(name, file, column, params)
        case Jsonl() | Url(format="jsonl"):
            yield from _jsonl_file(name, _as_utf8(name, file, source, params), start, source, params)
        case Text() | Url():
            head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            has_mark = _mark_of(head) or source.encoding != "utf-8"
            if head.startswith(b"%PDF-") or (b"\0" in head and not has_mark):
                yield [Rejected("binary", name)]
                return
            for texts in _text_file(name, _as_utf8(name, file, source, params), start, source, params):
                yield _without_invalid_bytes(name, texts) if source.on_bad == "skip" else texts


def can_be_divided(path: str, source: Source, params: CollectParams, n_bytes: int) -> bool:
    """Whether ranges of about `n_bytes` of a file can be read alone. A document is in the range where it begins."""
    with read_errors(path), Path(path).open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if is_packed(head) or _mark_of(head) is not None:
        return False
    match source:
        case Files() | Url() if codecs.lookup(source.encoding).name != "utf-8":
            return False
        case Text(document="file") | Url(format="text", document="file"):
            return params.max_document_bytes <= n_bytes  # it is cut anyway
        case Text() | Jsonl() | Url(format="text" | "jsonl"):
            return True
    return False


def is_packed(head: bytes) -> bool:
    """Whether a file that starts with `head` is compressed or an archive."""
    return head[257:262] == b"ustar" or head.startswith((b"PK\x03\x04", *_COMPRESSED))


def _separator(source: Source) -> str | None:
    """What ends a document of a text file; None if the file is one document."""
    if isinstance(source, Text | Url) and source.document == "line":
        return "\n"
    separator: str | None = getattr(source, "separator", None)
    return separator


def _boundary(file: BinaryIO, offset: int | None, separator: bytes) -> int:
    """The byte after the first separator from `offset` on, where a range may begin or end.

    0 for offset 0; the size of the file if no separator follows.
    """
    size = file.seek(0, os.SEEK_END)
    if offset == 0:
        return 0
    if offset is None:
        return size
    file.seek(offset)
    tail = b""
    while data := file.read(CHUNK):
        window = tail + data
        position = window.find(separator)
        if position >= 0:
            return offset + position + len(separator)
        offset += len(window) - len(tail := window[len(window) - len(separator) + 1 :])
    return size


class _Slice(io.RawIOBase):
    """The next `n_bytes` of a file."""

    def __init__(self, file: BinaryIO, n_bytes: int) -> None:
        self._file = file
        self._n_left = n_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._n_left))
        buffer[: len(data)] = data
        self._n_left -= len(data)
        return len(data)


def _mark_of(head: bytes) -> str | None:
    """The encoding whose byte order mark the data starts with."""
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)


def _as_utf8(
    name: str, file: io.BufferedReader, source: Jsonl | Text | Url, params: CollectParams
) -> io.BufferedReader:
    """The file itself if it is in UTF-8, or its content converted to UTF-8."""
    encoding = _mark_of(file.peek(4)[:4]) or codecs.lookup(source.encoding).name
    if encoding == "utf-8":
        return file
    return io.BufferedReader(_Transcoded(name, file, encoding, params.encoding_errors), CHUNK)


class _Transcoded(io.RawIOBase):
    """The text of a file in UTF-8."""

    def __init__(self, name: str, file: BinaryIO, encoding: str, errors: str) -> None:
        self._name = name
        self._file = file
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        self._n_read = 0  # bytes
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        is_last = False
        while not self._ready and not is_last:
            data = self._file.read(CHUNK)
            is_last = not data
            try:
                text = self._decoder.decode(data, final=is_last)
            except UnicodeDecodeError as error:
                place = f"near byte {self._n_read + error.start}"
                fix = "fix the file, or set `encoding` of the source"
                raise InputError(f"{self._name}: not {self._encoding} {place}; {fix}") from error
            self._ready = text.encode(errors="surrogatepass")
            self._n_read += len(data)
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


def _text_file(
    name: str, file: io.BufferedReader, start: int, source: Text | Url, params: CollectParams
) -> Iterator[list[str]]:
    """Documents of a text file: the whole file, or the parts between separators; long ones in pieces.

    With `on_bad: skip`, bytes that are not UTF-8 become lone surrogates.
    """
    separator = _separator(source)
    rest = ""
    is_continued = False  # whether `rest` continues a piece
    marks_invalid = source.on_bad == "skip" and params.encoding_errors == "strict"
    for chunk in _decoded(name, file, start, "surrogateescape" if marks_invalid else params.encoding_errors):
        rest += chunk
        if separator is not None:
            *documents, rest = rest.split(plain_line_ends(separator))
            if documents and is_continued:
                documents[0] = Piece(documents[0])
                is_continued = False
            yield documents
        if len(rest) > params.max_document_bytes:
            *pieces, rest = _pieces(Piece(rest) if is_continued else rest, params)
            is_continued = True
            yield pieces
    if rest or separator is None:
        yield [Piece(rest) if is_continued else rest]


def _without_invalid_bytes(name: str, texts: list[str]) -> list[str | Rejected]:
    """The texts without those that contain a byte that was not UTF-8."""
    problem = f"{name}: a document that is not UTF-8; convert the file, or set `encoding` of the source"
    bad = Rejected("not_utf8", problem)
    return [bad if _INVALID_BYTE.search(text) else text for text in texts]


def _decoded(name: str, file: BinaryIO, start: int, errors: str) -> Iterator[str]:
    """The text of a file in chunks, with plain line ends; `start` is the byte where `file` begins.

    Raises InputError at the first byte that is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors)
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    n_read = n_decoded = 0  # bytes
    while True:
        data = file.read(CHUNK)
        invalid = None
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            invalid = error
            # The text before the error comes first: a limit of the source may end before the error.
            text = decoder.decode(data[: max(0, error.start - (n_read - n_decoded))])
        yield text if n_decoded or start else text.removeprefix("\ufeff")
        if invalid:
            raise not_utf8(name, start + n_decoded + invalid.start) from invalid
        if not data:
            return
        n_read += len(data)
        n_decoded = n_read - len(utf8.getstate()[0])


def _jsonl_file(name: str, file: BinaryIO, start: int, source: Jsonl | Url, params: CollectParams) -> Texts:
    """One text for each line that is not blank; about a chunk of the file in a list.

    `start` is the byte of the file where `file` begins. Then line numbers are unknown, and messages name bytes.
    """
    max_line_bytes = _LINE_BYTES + 16 * params.max_document_bytes
    path = source.text_key.split(".")
    texts: list[str | Rejected] = []
    other_keys: dict[str, None] = {}  # of objects without the key, in order
    has_key = False
    number = 0  # of the line
    offset = next_yield = start  # byte of the line; byte after which a list is yielded
    while line := file.readline(max_line_bytes):
        number += 1
        place = _Place(name, number, offset, is_numbered=start == 0)
        offset += len(line)
        if len(line) == max_line_bytes and not line.endswith(b"\n"):
            offset += _skip_line(file)
            texts.append(Rejected("line_too_long", f"{place}: more than {max_line_bytes:,} bytes; split it"))
            continue
        value = _parse_line(line, place, params.encoding_errors)
        if isinstance(value, Rejected):
            texts.append(value)
        elif value is not _BLANK:
            text = _value_at(value, source.text_key, path)
            has_key = has_key or text is not _MISSING
            if text is _MISSING and isinstance(value, dict) and len(other_keys) < _MAX_KEYS:
                other_keys |= dict.fromkeys(list(value)[:_MAX_KEYS])
            texts.append(text if isinstance(text, str) else Rejected("no_text", str(place)))
        if offset >= next_yield:
            yield texts
            texts, next_yield = [], offset + CHUNK
    yield texts
    if other_keys and not has_key:
        problem = f"no line has the key `{source.text_key}`; the keys are {', '.join(other_keys)}"
        yield [Rejected("no_key", f"{name}: {problem}; set text_key of the source")]


class _Place(NamedTuple):
    """A line of a file, for a message."""

    name: str
    number: int
    offset: int  # bytes
    is_numbered: bool

    def __str__(self) -> str:
        return (
            f"{self.name}, line {self.number}" if self.is_numbered else f"{self.name}, the line at byte {self.offset}"
        )


_BLANK = object()  # a line without content
_MISSING = object()  # the value of a key that an object does not have


def _parse_line(line: bytes, place: _Place, errors: str) -> Any:
    """The JSON value of a line, _BLANK, or why it is bad."""
    try:
        content = line.decode(errors=errors).removeprefix("\ufeff").strip(" \t\r\n")
        if not content:
            return _BLANK
        value, end = _JSON.raw_decode(content)
        if end < len(content):
            raise ValueError(f"more text after its end, character {end}")
    except UnicodeDecodeError as error:
        return Rejected("not_utf8", str(not_utf8(place.name, place.offset + error.start)))
    except (ValueError, RecursionError) as error:
        is_array = place.is_numbered and place.number == 1 and content.startswith("[")
        return (
            _array(place) if is_array else Rejected("not_json", f"{place}: not JSON: {error}; fix or remove the line")
        )
    is_array = place.is_numbered and place.number == 1 and isinstance(value, list)
    return _array(place) if is_array else value


def _array(place: _Place) -> Rejected:
    problem = f"{place.name}: a JSON array, not one JSON object per line"
    return Rejected("not_json", f"{problem}; convert it, for example with `jq -c '.[]'`")


def _value_at(value: Any, key: str, path: list[str]) -> Any:
    """The value of a key, or of the last key of a path of keys; _MISSING if there is none."""
    if isinstance(value, dict) and key in value:
        return value[key]
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _skip_line(file: BinaryIO) -> int:
    """Read the rest of a line; returns its bytes."""
    n_bytes = 0
    while chunk := file.readline(CHUNK):
        n_bytes += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return n_bytes


def _parquet_file(name: str, file: BinaryIO, column: str, params: CollectParams) -> Texts:
    with seekable(file) as source:
        n_in = source.seek(0, os.SEEK_END)
        limit = growth_limit(n_in, params.max_expansion)
        memory = _MEMORY + _MEMORY_PER_BYTE * n_in
        arguments = (name, OpenFile(source), column, params.encoding_errors, limit, params.max_expansion)
        yield from isolated(name, parquet_rows, *arguments, memory=memory)

"""Documents of plain text files."""

import codecs
import io
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from gptpipe.collect.cleaning import cut_text, plain_line_ends
from gptpipe.collect.encodings import marked_encoding, not_utf8
from gptpipe.collect.file_kinds import HEAD_BYTES, is_text
from gptpipe.collect.params import CollectParams, Jsonl, Source, Text, Url
from gptpipe.collect.tables import CHUNK
from gptpipe.collect.texts import Piece, Rejected, Texts
from gptpipe.shell.errors import InputError

_MARK_INVALID = "gptpipe.mark_invalid"  # the name of an error handler of codecs
_INVALID_BYTE = re.compile("[\udc80-\udcff]")  # as `surrogateescape` decodes it


def separator_of(source: Source) -> str | None:
    """What ends a document of a text file; None if the file is one document."""
    if isinstance(source, Text | Url) and source.document == "line":
        return "\n"
    separator: str | None = getattr(source, "separator", None)
    return separator


def text_documents(
    name: str, file: io.BufferedReader, start: int, source: Text | Url, params: CollectParams
) -> Texts:
    """Documents of a text file: the whole file, or the parts between separators; long ones in pieces.

    `start` is the byte of the file where `file` begins. With `on_bad: skip`, documents that are not UTF-8 are
    bad records. Raises InputError without it.
    """
    lists = _documents(name, file, start, source, params)
    yield from (_without_invalid_bytes(name, texts) for texts in lists) if source.on_bad == "skip" else lists


def _documents(
    name: str, file: io.BufferedReader, start: int, source: Text | Url, params: CollectParams
) -> Iterator[list[str]]:
    """With `on_bad: skip`, bytes that are not UTF-8 become lone surrogates."""
    separator = separator_of(source)
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
            *pieces, rest = cut_text(Piece(rest) if is_continued else rest, params.max_document_bytes)
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
    head = b""
    while True:
        data = file.read(CHUNK)
        head = head or data
        invalid = None
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            invalid = error
            # The text before the error comes first: a limit of the source may end before the error.
            text = decoder.decode(data[: max(0, error.start - (n_read - n_decoded))])
        yield text if n_decoded or start else text.removeprefix("\ufeff")
        if invalid:
            raise not_utf8(name, start + n_decoded + invalid.start, head) from invalid
        if not data:
            return
        n_read += len(data)
        n_decoded = n_read - len(utf8.getstate()[0])


def as_utf8(
    name: str, file: io.BufferedReader, source: Text | Jsonl | Url, params: CollectParams
) -> io.BufferedReader:
    """The file itself if it is in UTF-8, or its content converted to it. A byte order mark has precedence.

    With `on_bad: skip`, bytes that cannot be converted become bytes that are not UTF-8, so that only their
    document is rejected. Raises InputError for a file in UTF-8 if the source says UTF-16 or UTF-32: converted,
    it would be garbage that passes as text.
    """
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    encoding = marked_encoding(head) or source.encoding
    if encoding == "utf-8" or head.startswith(codecs.BOM_UTF8):
        return file
    if encoding.startswith(("utf-16", "utf-32")) and head and is_text(head):
        problem = f"{name}: UTF-8, but encoding of the source is {encoding}"
        raise InputError(f"{problem}; give the files in UTF-8 a source of their own")
    errors: str = params.encoding_errors
    if source.on_bad == "skip" and errors == "strict":
        codecs.register_error(_MARK_INVALID, _mark_invalid)
        errors = _MARK_INVALID
    return io.BufferedReader(_Transcoded(name, file, encoding, errors), CHUNK)


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    """For bytes that cannot be decoded, a lone surrogate, as `surrogateescape` has for single bytes."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80", error.end


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

"""Byte ranges of large files, each of which can be read alone."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gptpipe.collect import archives
from gptpipe.collect.encodings import marked_encoding
from gptpipe.collect.open_files import is_packed
from gptpipe.collect.params import CollectParams, Jsonl, Parquet, Source, Text, Url
from gptpipe.collect.tables import CHUNK, read_errors

_HEAD_BYTES = 512  # of a file, which show its kind


def can_be_divided(path: str, source: Source, params: CollectParams, n_bytes: int) -> bool:
    """Whether ranges of about `n_bytes` of a local file can be read alone.

    A document, row group or member of an archive is in the range where it begins.
    """
    head = _head(path)
    if archives.is_zip(head):
        return True
    if is_packed(path, head):
        return False
    match source:
        case Parquet() | Url(format="parquet"):
            return True
        case Text() | Jsonl() | Url() if marked_encoding(head) or source.encoding != "utf-8":
            return False
        case Text(document="file") | Url(format="text", document="file"):
            return params.max_document_bytes <= n_bytes  # it is cut anyway
    return True


def is_zip(path: str) -> bool:
    return archives.is_zip(_head(path))


def _head(path: str) -> bytes:
    with read_errors(path), Path(path).open("rb") as file:
        return file.read(_HEAD_BYTES)


@contextmanager
def open_range(
    path: str, start: int, end: int | None, separator: str
) -> Iterator[tuple[int, io.BufferedReader]]:
    """The documents of a file that begin in a range, as a stream, and the byte of the file where it begins."""
    with Path(path).open("rb") as file:
        first = _boundary(file, start, separator.encode())
        last = _boundary(file, end, separator.encode())
        file.seek(first)
        yield first, io.BufferedReader(_Slice(file, last - first), CHUNK)


def _boundary(file: BinaryIO, offset: int | None, separator: bytes) -> int:
    """The byte after the first separator from `offset` on, where a range may begin or end.

    0 for offset 0; the size of the file for None, and if no separator follows. Separators that overlap others
    do not count, as in three line feeds where the separator is two: which of them counts depends on the text
    before.
    """
    size = file.seek(0, os.SEEK_END)
    if offset is None or offset == 0:
        return size if offset is None else 0
    n = len(separator)
    first_byte = max(0, offset - n + 1)  # of the window; what is before `offset` may overlap a separator
    file.seek(first_byte)
    window = b""
    position = offset - first_byte  # in the window, where the search goes on
    is_end = False
    while not is_end:
        data = file.read(CHUNK)
        is_end = not data
        window += data
        position = window.find(separator, position)
        while position >= 0 and (is_end or position + 2 * n <= len(window)):
            if _is_alone(window, separator, position):
                return first_byte + position + n
            position = window.find(separator, position + 1)
        if position < 0:
            position = max(0, len(window) - n + 1)
        n_done = max(0, position - n + 1)
        first_byte += n_done
        window = window[n_done:]
        position -= n_done
    return size


def _is_alone(window: bytes, separator: bytes, position: int) -> bool:
    """Whether no other occurrence of the separator overlaps the one at `position`."""
    around = window[max(0, position - len(separator) + 1) : position + 2 * len(separator) - 1]
    first = around.find(separator)
    return around.find(separator, first + 1) < 0


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

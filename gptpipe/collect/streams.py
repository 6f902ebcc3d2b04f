"""Bytes of files as buffered streams, whose errors name the file."""

import io
import lzma
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from gptpipe.collect.tables import CHUNK
from gptpipe.shell.errors import GptpipeError, InputError, first_line
from gptpipe.shell.locks import disk_errors

DICTIONARY_BYTES = 160 << 20  # of memory to unpack xz; `xz -9` needs 65 MiB

OnRead = Callable[[bytes], None]  # is called with all bytes that are read


class Readable(Protocol):
    """Something that can be read; it may return less than was asked for, and nothing only at its end."""

    def read(self, most: int, /) -> bytes: ...


class Stream(io.RawIOBase):
    """Fills each buffer, even if the file returns less at once; calls `on_read` with the bytes."""

    def __init__(
        self, file: Readable, on_read: OnRead, errors: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._file = file
        self._on_read = on_read
        self._errors = errors

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = 0
        while n < len(buffer):
            with self._errors():
                data = self._file.read(len(buffer) - n)
            if not data:
                break
            buffer[n : n + len(data)] = data
            self._on_read(data)
            n += len(data)
        return n


def buffered(name: str, file: Readable, on_read: OnRead) -> io.BufferedReader:
    """The stream of a file that is being unpacked."""
    return io.BufferedReader(Stream(file, on_read, partial(unpack_errors, name)), CHUNK)


@contextmanager
def seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file itself if it can seek, else a temporary copy on disk."""
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        while data := file.read(CHUNK):
            with disk_errors(Path(tempfile.gettempdir())):
                copy.write(data)
                copy.flush()
        copy.seek(0)
        yield copy


def drain(file: Readable) -> None:
    """Read up to the end of the file."""
    while file.read(CHUNK):
        pass


@contextmanager
def unpack_errors(name: str) -> Iterator[None]:
    """Turn an error of unpacking into an InputError. The libraries do not document all kinds of errors."""
    try:
        yield
    except (GptpipeError, MemoryError):
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"{name}: cannot read: {reason}; fix the file, or collect.sources") from error
    except Exception as error:
        if isinstance(error, lzma.LZMAError) and "limit" in str(error):
            needed = f"more than {DICTIONARY_BYTES >> 20} MiB of memory to unpack"
            raise InputError(f"{name}: needs {needed}; pack it again with `xz -9`") from error
        reason = first_line(error)
        raise InputError(f"{name}: damaged, truncated or encrypted: {reason}; replace the file") from error

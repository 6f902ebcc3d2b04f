"""Decompresses gzip, bzip2, xz, lzma, Zstandard and LZ4 as streams, in bounded memory.

A file is compressed if its first bytes are a valid header of a format. The magic number alone is not enough:
a text may start with `BZh`.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa

from gptpipe.collect.streams import DICTIONARY_BYTES, Readable
from gptpipe.collect.tables import CHUNK
from gptpipe.shell.errors import InputError

HEAD_BYTES = 32  # of a file, enough for `decompressor`

_GZIP = b"\x1f\x8b\x08"  # the third byte is the only method
_BZIP2 = b"BZh"
_BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")  # starts of a block, and of the end
_XZ = b"\xfd7zXZ\0"
_ZSTD = b"\x28\xb5\x2f\xfd"
_LZ4 = b"\x04\x22\x4d\x18"
_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f; of a frame without content, in Zstandard and LZ4

_ZSTD_WINDOW = 1 << 27  # bytes; pyarrow refuses larger windows
_ZSTD_WINDOW_DESCRIPTOR = bytes([(27 - 10) << 3])  # of that window

Decompressor = Callable[[str, io.BufferedReader], Readable]  # for the name and content of a file


def decompressor(head: bytes) -> Decompressor | None:
    """What decompresses a file that starts with `head`; None if it is not compressed."""
    if head.startswith(_GZIP) and head[3:4] < b"\x20":  # three bits are reserved
        return lambda name, file: _Frames(file, _Gzip)
    if head.startswith(_BZIP2) and head[3:4] in b"123456789" and head[4:10] in _BZIP2_BLOCKS:
        return lambda name, file: _Frames(file, bz2.BZ2Decompressor)
    if head.startswith(_XZ):
        return lambda name, file: _Frames(file, lambda: lzma.LZMADecompressor(memlimit=DICTIONARY_BYTES))
    if _is_lzma(head):
        return lambda name, file: _Lzma(file)
    first_frame = _without_skippable(head)
    if _is_lz4(first_frame):
        return lambda name, file: pa.CompressedInputStream(file, "lz4")
    if _is_skippable(head) or head.startswith(_ZSTD):
        return _ZstdFrames
    return None


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 8 and head[0] & 0xF0 == 0x50 and head[1:4] == _SKIPPABLE


def _is_lz4(head: bytes) -> bool:
    """Whether it is a frame of version 1: four bits are reserved, and the largest block has size 4 to 7."""
    return (
        len(head) >= 7
        and head.startswith(_LZ4)
        and head[4] & 0xC2 == 0x40
        and head[5] & 0x8F == 0
        and head[5] >= 64
    )


def _is_lzma(head: bytes) -> bool:
    """Whether it is a header of the format before xz, which has no magic number.

    Like xz, accept only dictionaries of 2**n or 2**n + 2**(n-1) bytes, and a size unknown or below 256 GiB.
    """
    if len(head) < 14 or head[0] != 0x5D or head[13] != 0:
        return False
    dictionary = int.from_bytes(head[1:5], "little")
    size = int.from_bytes(head[5:13], "little")
    is_usual = f"{dictionary:b}".rstrip("0") in ("1", "11")
    return is_usual and dictionary >= 1 << 12 and (size == (1 << 64) - 1 or size < 1 << 38)


def _without_skippable(head: bytes) -> bytes:
    """The bytes after the skippable frames at the start: pzstd writes one. None are left if a frame is long."""
    while _is_skippable(head):
        head = head[8 + int.from_bytes(head[4:8], "little") :]
    return head


class _Gzip:
    """Decompresses one member of a gzip file; has the interface of bz2.BZ2Decompressor.

    gzip.GzipFile reads a header byte by byte, which takes minutes if it contains a name of 1 GB.
    """

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._inflate.decompress(self._inflate.unconsumed_tail + data, most)

    @property
    def needs_input(self) -> bool:
        return not self._inflate.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data


class _Frames:
    """Decompresses gzip, bzip2 or xz: one or several frames, with only zeros between and after them."""

    def __init__(self, file: BinaryIO, new_decoder: Callable[[], Any]) -> None:
        self._file = file
        self._new_decoder = new_decoder
        self._decoder = new_decoder()

    def read(self, most: int, /) -> bytes:
        while True:
            if self._decoder.eof:
                data = self._start_of_next_frame()
                if not data:
                    return b""
                self._decoder = self._new_decoder()
            else:
                data = self._file.read(CHUNK) if self._decoder.needs_input else b""
            needed_input = self._decoder.needs_input
            if unpacked := self._decoder.decompress(data, most):
                return bytes(unpacked)
            if needed_input and not data and not self._decoder.eof:
                raise EOFError("the compressed data ends too early")

    def _start_of_next_frame(self) -> bytes:
        """The next bytes that are not zero, or none at the end of the file."""
        data: bytes = self._decoder.unused_data.lstrip(b"\0")
        while not data:
            chunk = self._file.read(CHUNK)
            if not chunk:
                break
            data = chunk.lstrip(b"\0")
        return data


class _Lzma:
    """Decompresses a file of the format before xz. It has a single frame."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._data = file.read(13)  # the header: a byte, the size of the dictionary, the size of the content
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, DICTIONARY_BYTES)

    def read(self, most: int, /) -> bytes:
        while not self._decoder.eof:
            if self._decoder.needs_input and not self._data:
                self._data = self._file.read(CHUNK)
                if not self._data:
                    raise EOFError("the compressed data ends too early")
            unpacked = self._decoder.decompress(self._data, most)
            self._data = b""
            if unpacked:
                return unpacked
        if self._decoder.unused_data or self._file.read(1):
            raise ValueError("more bytes after the compressed data")
        return b""


class _ZstdFrames:
    """Decompresses Zstandard: one or several frames, and skippable frames between them."""

    def __init__(self, name: str, file: io.BufferedReader) -> None:
        self._name = name
        self._file = file
        self._frame: _ZstdFrame | None = None

    def read(self, most: int, /) -> bytes:
        while True:
            if self._frame is None:
                magic = self._next_magic()
                if not magic:
                    return b""
                self._frame = _ZstdFrame(self._name, self._file, magic)
            if data := self._frame.read(most):
                return data
            self._frame = None

    def _next_magic(self) -> bytes:
        """Read the first four bytes of the next frame with content; none at the end of the file."""
        while True:
            magic = self._file.read(4)
            if len(magic) < 4 or magic[0] & 0xF0 != 0x50 or magic[1:] != _SKIPPABLE:
                return magic
            n_bytes = int.from_bytes(self._file.read(4), "little")
            while n_bytes:
                skipped = len(self._file.read(min(n_bytes, CHUNK)))
                if not skipped:
                    raise EOFError("the compressed data ends too early")
                n_bytes -= skipped


class _ZstdFrame:
    """Decompresses one frame.

    A frame with a window above 128 MiB (`zstd --long=31`) is read with a window of 128 MiB, as long as its
    content is not longer: then nothing before the window exists that the frame could refer to.
    """

    def __init__(self, name: str, file: BinaryIO, magic: bytes) -> None:
        self._name = name
        self._n_out = 0
        header, self._window = _zstd_header(magic, file)
        if self._window > _ZSTD_WINDOW:
            header = _with_smaller_window(header)
        has_checksum = len(header) > 4 and header[4] & 4 != 0
        self._unpacked = pa.CompressedInputStream(_ZstdBytes(file, header, has_checksum), "zstd")

    def read(self, most: int) -> bytes:
        data: bytes = self._unpacked.read(most)
        self._n_out += len(data)
        if self._window > _ZSTD_WINDOW and self._n_out > _ZSTD_WINDOW:
            problem = f"needs a window of {self._window >> 20:,} MiB to unpack, above {_ZSTD_WINDOW >> 20}"
            raise InputError(
                f"{self._name}: {problem}; unpack it with `zstd -d --long=31`, and pack it without --long"
            )
        return data


def _zstd_header(magic: bytes, file: BinaryIO) -> tuple[bytes, int]:
    """The header of a frame, and the size of its window in bytes. It is shorter if the file ends.

    RFC 8878, section 3.1.1.1: magic number, descriptor, window, dictionary, size of the content. If the frame
    is a single segment, the window is left out, because it is the whole content.
    """
    start = magic + file.read(1)
    if magic != _ZSTD or len(start) < 5:
        return start, 0
    is_single_segment = start[4] & 0x20 != 0
    n_window = 0 if is_single_segment else 1
    n_dictionary = (0, 1, 2, 4)[start[4] & 3]
    n_size = (1 if is_single_segment else 0, 2, 4, 8)[start[4] >> 6]
    rest = file.read(n_window + n_dictionary + n_size)
    if is_single_segment:
        return start + rest, int.from_bytes(rest[n_dictionary:], "little")
    exponent, mantissa = divmod(rest[0] if rest else 0, 8)
    return start + rest, (1 << 10 + exponent) // 8 * (8 + mantissa)


def _with_smaller_window(header: bytes) -> bytes:
    """The header with a window of 128 MiB, and without the size of the content."""
    is_single_segment = header[4] & 0x20 != 0
    start = 5 if is_single_segment else 6
    n_dictionary = (0, 1, 2, 4)[header[4] & 3]
    return (
        header[:4] + bytes([header[4] & 0x1F]) + _ZSTD_WINDOW_DESCRIPTOR + header[start : start + n_dictionary]
    )


class _ZstdBytes(io.RawIOBase):
    """The bytes of one frame: its header, its blocks and its checksum.

    Shorter if the file ends, which pyarrow detects. The next frame is not touched, because it may need another
    window.
    """

    def __init__(self, file: BinaryIO, header: bytes, has_checksum: bool) -> None:
        self._file = file
        self._start = header  # bytes to return first
        self._left = 0  # bytes of the current block after these
        self._is_last = header[:4] != _ZSTD  # else blocks follow
        self._checksum = 4 if has_checksum else 0  # bytes after the last block

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = 0
        while n < len(buffer):
            if self._start:
                data, self._start = self._start[: len(buffer) - n], self._start[len(buffer) - n :]
            elif self._left:
                data = self._file.read(min(self._left, len(buffer) - n))
                self._left = self._left - len(data) if data else 0
            elif not self._next_block():
                break
            else:
                continue
            buffer[n : n + len(data)] = data
            n += len(data)
        return n

    def _next_block(self) -> bool:
        """Read the header of the next block; return whether something follows."""
        if self._is_last:
            self._left, self._checksum = self._checksum, 0
            return self._left > 0
        self._start = self._file.read(3)
        header = int.from_bytes(self._start, "little")
        self._is_last = header & 1 != 0 or len(self._start) < 3
        is_repeated_byte = header >> 1 & 3 == 1
        self._left = 1 if is_repeated_byte else header >> 3
        return self._start != b""

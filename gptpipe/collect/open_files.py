"""Opens files as streams: plain, compressed or in an archive, local or at an fsspec address.

Nothing is extracted to disk. Memory is bounded for hostile files, too: each header, directory and dictionary
has a limit, which is checked before memory for it is allocated.
"""

import bz2
import hashlib
import io
import lzma
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from gptpipe.collect.tables import CHUNK, check_growth, is_remote, read_errors
from gptpipe.shell.environment import optional_module
from gptpipe.shell.errors import GptpipeError, InputError, first_line
from gptpipe.shell.locks import disk_errors

_FREE_BYTES = 64 << 20  # what any file may expand to, however small it is
_HEADER_BYTES = 1 << 20  # of an extended header in a tar archive
_DIRECTORY_BYTES = 16 << 20  # of a zip archive; its entries need about 15 times as much memory
_DICTIONARY_BYTES = 160 << 20  # of memory to unpack xz; `xz -9` needs 65 MiB

OnRead = Callable[[bytes], None]  # is called with all bytes that are read


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

    def __init__(self, file: Any, new_decoder: Callable[[], Any]) -> None:
        self._file = file
        self._new_decoder = new_decoder
        self._decoder = new_decoder()

    def read(self, most: int) -> bytes:
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


_COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: _Frames(file, _Gzip),
    b"BZh": lambda file: _Frames(file, bz2.BZ2Decompressor),
    b"\xfd7zXZ\0": lambda file: _Frames(file, lambda: lzma.LZMADecompressor(memlimit=_DICTIONARY_BYTES)),
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
}


class _Stream(io.RawIOBase):
    """Fills each buffer, even if the file returns less at once; calls `on_read` with the bytes."""

    def __init__(self, file: Any, on_read: OnRead, errors: Callable[[], AbstractContextManager[None]]) -> None:
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


def open_files(address: str, max_expansion: int, digests: dict[str, str]) -> Iterator[tuple[str, io.BufferedReader]]:
    """Name and content of a file, or of each file in an archive, in order.

    An archive is tar or zip; it and its files may be compressed. Raises InputError for damaged files, and if
    the content is larger than `max_expansion` times the file. A remote file is read once; the SHA-256 of what
    was read is stored in `digests`. Call it inside `read_errors`.
    """
    sha256 = hashlib.sha256()
    n_in = n_out = 0  # bytes of the file, and bytes of its content

    def count_in(data: bytes) -> None:
        nonlocal n_in
        sha256.update(data)
        n_in += len(data)

    def count_out(data: bytes) -> None:
        nonlocal n_out
        n_out += len(data)
        check_growth(address, n_out, growth_limit(n_in or Path(address).stat().st_size, max_expansion), max_expansion)

    with _open(address) as raw:
        if not is_remote(address):
            yield from _unpacked(address, _decompressed(address, raw, count_out), count_out)
            return
        file: io.BufferedReader = io.BufferedReader(_Stream(raw, count_in, partial(read_errors, address)), CHUNK)
        try:
            yield from _unpacked(address, _decompressed(address, file, count_out), count_out)
            _drain(file)
        finally:  # also if a limit ends the source early
            digests[address] = sha256.hexdigest()


def growth_limit(n_in: int, max_expansion: int) -> int:
    """How many bytes a file of `n_in` bytes may expand to."""
    return max(_FREE_BYTES, max_expansion * n_in)


def _unpacked(name: str, file: io.BufferedReader, on_read: OnRead) -> Iterator[tuple[str, io.BufferedReader]]:
    head = file.peek(512)
    members: Iterator[tuple[str, Any]]
    if head[257:262] == b"ustar":
        members = _tar_members(name, file)
    elif head.startswith(b"PK\x03\x04"):
        members = _zip_members(name, file)
    else:
        yield name, file
        return
    for member, content in members:
        yield member, _decompressed(member, _buffered(member, content, on_read), on_read)


class _TarContent:
    """The content of one member of a tar archive, as a file."""

    def __init__(self, file: Any, n_bytes: int) -> None:
        self._file = file
        self._left = n_bytes

    def read(self, most: int) -> bytes:
        data: bytes = self._file.read(min(most, self._left))
        self._left -= len(data)
        if self._left and not data and most:
            raise EOFError("the archive ends too early")
        return data


_EXTENDED = {
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
_WITHOUT_CONTENT = {
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
}


def _tar_members(name: str, file: io.BufferedReader) -> Iterator[tuple[str, _TarContent]]:
    """Name and content of each regular file in a tar archive.

    tarfile.TarFile is not used: it reads extended headers of any size, chains of them by recursion, and keeps a
    record of every member.
    """
    with _unpack_errors(name):
        fields: dict[str, str] = {}  # from the extended headers before the member's header
        while True:
            block = file.read(tarfile.BLOCKSIZE)
            if block == bytes(tarfile.BLOCKSIZE):  # marks the end
                break
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.type in _EXTENDED:
                fields |= _extended_header(name, file, header)
                continue
            member = f"{name}: {fields.get('path', header.name)}"
            size = 0 if header.type in _WITHOUT_CONTENT else int(fields.get("size", header.size))
            if size < 0:
                raise ValueError("a negative size")
            is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in fields)
            if is_sparse:
                raise InputError(f"{member}: a sparse file; pack the archive again without --sparse")
            fields = {}
            content = _TarContent(file, size + -size % tarfile.BLOCKSIZE)
            if header.isreg():
                yield member, _TarContent(content, size)
            _drain(content)
        _drain(file)  # detects that the compressed stream around the archive is truncated


def _extended_header(name: str, file: BinaryIO, header: tarfile.TarInfo) -> dict[str, str]:
    """Fields of a GNU or pax header for the next member. Global headers, for all later members, are ignored."""
    if not 0 <= header.size <= _HEADER_BYTES:
        raise InputError(f"{name}: a header of {header.size:,} bytes, above {_HEADER_BYTES:,}; pack the archive again")
    content = file.read(header.size + -header.size % tarfile.BLOCKSIZE)[: header.size]
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _decoded(content.partition(b"\0")[0])}
    if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return {}
    fields = {}
    position = 0
    while position < len(content):  # a record is for example b"13 path=name\n"; it starts with its length
        space = content.index(b" ", position, position + 20)
        end = position + int(content[position:space])
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            raise ValueError("a pax header with a wrong length")
        fields[_decoded(key)] = _decoded(value)
        position = end
    return fields


def _decoded(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


class _BoundedReads:
    """Limits the reads of zipfile.ZipFile, which reads the directory of an archive at once, whatever its size."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, n: int = -1) -> bytes:
        if n > _DIRECTORY_BYTES:
            raise InputError(f"{self._name}: a directory of {n:,} bytes, above {_DIRECTORY_BYTES:,}; split the archive")
        return self._file.read(n)


def _zip_members(name: str, file: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    """Name and content of each regular file in a zip archive."""
    with seekable(file) as source, _unpack_errors(name), zipfile.ZipFile(_BoundedReads(name, source)) as archive:
        for info in archive.infolist():
            if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            member = f"{name}: {info.filename}"
            if (
                info.compress_type == zipfile.ZIP_LZMA
            ):  # its header may request 4 GiB of memory, and zipfile has no limit
                raise InputError(f"{member}: packed with LZMA; pack the archive again with deflate")
            with _unpack_errors(member), archive.open(info) as content:
                yield member, content


def _decompressed(name: str, file: io.BufferedReader, on_read: OnRead) -> io.BufferedReader:
    """The decompressed content of a file, or the file itself if it is not compressed."""
    head = file.peek(16)
    for magic, decompress in _COMPRESSED.items():
        if head.startswith(magic):
            return _buffered(name, decompress(file), on_read)
    return file


def _buffered(name: str, file: Any, on_read: OnRead) -> io.BufferedReader:
    return io.BufferedReader(_Stream(file, on_read, partial(_unpack_errors, name)), CHUNK)


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


def _drain(file: BinaryIO | _TarContent) -> None:
    while file.read(CHUNK):
        pass


def _open(address: str) -> Any:
    if not is_remote(address):
        return Path(address).open("rb", CHUNK)
    system, path = _file_system(address)
    # Block size 0 makes HTTP stream, because not every server supports ranges.
    return system.open(path, "rb", **({"block_size": 0} if address.startswith("http") else {}))


def remote_addresses(pattern: str) -> list[str]:
    """The files that match a remote glob, sorted; for HTTP, where `?` is no wildcard, the address itself."""
    if pattern.startswith("http"):
        return [pattern]
    with read_errors(pattern):
        system, path = _file_system(pattern)
        names = system.glob(path)
    if not names:
        raise InputError(f"{pattern}: no file matches; fix collect.sources in params.yaml")
    return sorted(system.unstrip_protocol(name) for name in names)


def _file_system(address: str) -> tuple[Any, str]:
    fsspec = optional_module("fsspec", "remote")
    options: dict[str, Any] = {}
    if address.startswith("http"):  # the default limits reading a whole file to five minutes
        timeout = optional_module("aiohttp", "remote").ClientTimeout(total=None, sock_connect=30, sock_read=60)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        system, path = fsspec.core.url_to_fs(address, **options)
    except (ImportError, ValueError) as error:  # the package for s3 or gs is missing, or the protocol is unknown
        raise InputError(f"{address}: {first_line(error)}; for s3: pip install -e '.[s3]', for gs: '.[gs]'") from error
    return system, path


@contextmanager
def _unpack_errors(name: str) -> Iterator[None]:
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
            needed = f"more than {_DICTIONARY_BYTES >> 20} MiB of memory to unpack"
            raise InputError(f"{name}: needs {needed}; pack it again with `xz -9`") from error
        reason = first_line(error)
        raise InputError(f"{name}: damaged, truncated or encrypted: {reason}; replace the file") from error

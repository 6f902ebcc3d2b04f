"""Files as streams: plain, compressed or in an archive, here or at an fsspec address; nothing is extracted."""

import bz2
import gzip
import hashlib
import io
import lzma
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from gptpipe.environment import optional_module
from gptpipe.errors import GptpipeError, InputError, ResourceError, first_line
from gptpipe.files import disk_errors

CHUNK = 1 << 18  # bytes read at once
_FREE_BYTES = 64 << 20  # so much may come out of any file, however small it is
_COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile,
            pa.ArrowException, RuntimeError, NotImplementedError)  # fmt: skip


Note = Callable[[bytes], None]


class _Stream(io.RawIOBase):
    """Reads in full from what may give less; calls `note` with each piece of bytes."""

    def __init__(self, file: Any, note: Note) -> None:
        self._file, self._note = file, note

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = 0
        while n < len(buffer) and (data := self._file.read(len(buffer) - n)):
            buffer[n : n + len(data)] = data
            self._note(data)
            n += len(data)
        return n


def is_remote(address: str) -> bool:
    return "://" in address


def open_files(address: str, max_expansion: int, digests: dict[str, str]) -> Iterator[tuple[str, io.BufferedReader]]:
    """Name and content of a file, or of each file in an archive (tar or zip, its files compressed or not), in order.

    Raises InputError where more comes out than `max_expansion` times what went in. A remote file is read once, and the
    SHA-256 of what was read is noted in `digests`. Run it inside `read_errors`.
    """
    sha256, n_in, n_out = hashlib.sha256(), 0, 0

    def count_in(data: bytes) -> None:
        nonlocal n_in
        sha256.update(data)
        n_in += len(data)

    def count_out(data: bytes) -> None:
        nonlocal n_out
        n_out += len(data)
        check_growth(address, n_in or Path(address).stat().st_size, n_out, max_expansion)

    with _open(address) as raw:
        if not is_remote(address):
            yield from _unpacked(address, _decompressed(raw, count_out), count_out)
            return
        file = _noted(raw, count_in)
        try:
            yield from _unpacked(address, _decompressed(file, count_out), count_out)
            _drain(file)
        finally:  # also where a source's limit ends it
            digests[address] = sha256.hexdigest()


def check_growth(name: str, n_in: int, n_out: int, max_expansion: int) -> None:
    """Raise InputError where more bytes come out than `max_expansion` times those that went in."""
    if n_out > max(_FREE_BYTES, max_expansion * n_in):
        raise InputError(f"{name}: grows to more than {max_expansion} times its size; remove it, or raise "
                         "collect.max_expansion")  # fmt: skip


def _unpacked(name: str, file: io.BufferedReader, note: Note) -> Iterator[tuple[str, io.BufferedReader]]:
    head = file.peek(512)
    if head[257:262] == b"ustar":
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if member.isfile():
                    yield f"{name}: {member.name}", _decompressed(_noted(tar.extractfile(member), note), note)
        _drain(file)  # so that a truncated stream around the archive is seen
    elif head.startswith(b"PK\x03\x04"):
        with seekable(file) as whole, zipfile.ZipFile(whole) as archive:
            for info in archive.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    with archive.open(info) as inside:
                        yield f"{name}: {info.filename}", _decompressed(_noted(inside, note), note)
    else:
        yield name, file


def _decompressed(file: io.BufferedReader, note: Note) -> io.BufferedReader:
    head = file.peek(16)
    opener = next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)
    return _noted(opener(file), note) if opener else file


def _noted(file: Any, note: Note) -> io.BufferedReader:
    return io.BufferedReader(_Stream(file, note), CHUNK)


@contextmanager
def seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file itself, or a nameless copy on disk of a stream that cannot go back."""
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


def _drain(file: BinaryIO) -> None:
    while file.read(CHUNK):
        pass


def _open(address: str) -> Any:
    if not is_remote(address):
        return Path(address).open("rb", CHUNK)
    system, path = _file_system(address)
    # Block size 0 lets HTTP stream: not every server can give ranges.
    return system.open(path, "rb", **({"block_size": 0} if address.startswith("http") else {}))


def remote_addresses(pattern: str) -> list[str]:
    """The files that a remote glob names, sorted; over HTTP, where `?` is no wildcard, the address itself."""
    if pattern.startswith("http"):
        return [pattern]
    with read_errors(pattern):
        system, path = _file_system(pattern)
        names = system.glob(path)
    if not names:
        raise InputError(f"{pattern}: no file matches; mend collect.sources in params.yaml")
    return sorted(system.unstrip_protocol(name) for name in names)


def _file_system(address: str) -> tuple[Any, str]:
    fsspec = optional_module("fsspec", "remote")
    options: dict[str, Any] = {}
    if address.startswith("http"):  # by default the whole of a file has five minutes
        timeout = optional_module("aiohttp", "remote").ClientTimeout(total=None, sock_connect=30, sock_read=60)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        system, path = fsspec.core.url_to_fs(address, **options)
    except (ImportError, ValueError) as error:  # no package for s3 or gs, or no such protocol
        raise InputError(f"{address}: {first_line(error)}; for s3: pip install -e '.[s3]', for gs: '.[gs]'") from error
    return system, path


@contextmanager
def read_errors(name: str) -> Iterator[None]:
    """Turn what reading can raise into one line."""
    try:
        yield
    except GptpipeError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{name}: damaged, truncated or encrypted: {first_line(error)}; replace the file") from error
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

"""Members of tar and zip archives as streams.

Memory is bounded for hostile archives, too: each header and directory has a limit, which is checked before
memory for it is allocated.
"""

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from math import inf
from typing import Any, BinaryIO

from gptpipe.collect.streams import Readable, drain, seekable, unpack_errors
from gptpipe.collect.texts import Rejected
from gptpipe.shell.errors import InputError

HEAD_BYTES = tarfile.BLOCKSIZE  # of a file, enough for `is_tar` and `is_zip`

_HEADER_BYTES = 1 << 20  # of an extended header in a tar archive
_DIRECTORY_BYTES = 16 << 20  # of a zip archive; its entries need about 15 times as much memory
_ZIP_HEADER_BYTES = 34  # of the mark and the first member
# Not LZMA: its header may request 4 GiB of memory, and zipfile has no limit.
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_OTHER_ZIP_METHODS = {9: "Deflate64", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd"}
_ENCRYPTED = 1  # a bit of the flags of a member
_MIME_TYPE_BYTES = 200  # of the member that names the type of a document

# The path of a member in its archive, and its content or why there is none.
Members = Iterator[tuple[str, Readable | Rejected]]


def is_tar(head: bytes) -> bool:
    """Whether a file starts with the header of a tar archive.

    Archives before POSIX have no magic number, but the sum of the header is right. A text that contains `ustar`
    in the right place has neither the zeros of the magic number nor the sum.
    """
    if head[257:263] == b"ustar\0" or head[257:265] == b"ustar  \0":
        return True
    if len(head) < tarfile.BLOCKSIZE or not head.strip(b"\0"):
        return False
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def is_zip(head: bytes) -> bool:
    """Whether a file starts like a zip archive: with a member, the end of an empty archive, or a mark.

    The header of a member contains zeros, unlike a text that starts with these bytes.
    """
    marks = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08PK\x03\x04", b"PK00PK\x03\x04")
    return head.startswith(marks) and b"\0" in head[:_ZIP_HEADER_BYTES]


class _TarContent:
    """The content of one member of a tar archive, as a file."""

    def __init__(self, file: BinaryIO, n_bytes: int) -> None:
        self._file = file
        self._left = n_bytes

    def read(self, most: int, /) -> bytes:
        data = self._file.read(min(most, self._left))
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


def tar_members(name: str, file: BinaryIO) -> Members:
    """Path and content of each regular file in a tar archive.

    tarfile.TarFile is not used: it reads extended headers of any size, chains of them by recursion, and keeps a
    record of every member.
    """
    with unpack_errors(name):
        fields: dict[str, str] = {}  # from the extended headers before the member's header
        while True:
            block = file.read(tarfile.BLOCKSIZE)
            if block == bytes(tarfile.BLOCKSIZE):  # marks the end
                break
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.type in _EXTENDED:
                fields |= _extended_header(name, file, header)
                continue
            path = fields.get("path", header.name)
            size = 0 if header.type in _WITHOUT_CONTENT else int(fields.get("size", header.size))
            if size < 0:
                raise ValueError("a negative size")
            has_sparse_field = any(key.startswith("GNU.sparse.") for key in fields)
            if header.type == tarfile.GNUTYPE_SPARSE or has_sparse_field:
                raise InputError(f"{name}: {path}: a sparse file; pack the archive again without --sparse")
            fields = {}
            content = _TarContent(file, size + -size % tarfile.BLOCKSIZE)
            if header.isreg():
                yield path, _TarContent(content, size)  # type: ignore[arg-type]
            drain(content)
        drain(file)  # detects that the compressed stream around the archive is truncated


def _extended_header(name: str, file: BinaryIO, header: tarfile.TarInfo) -> dict[str, str]:
    """Fields of a GNU or pax header for the next member. Global headers, for all later members, are ignored."""
    if not 0 <= header.size <= _HEADER_BYTES:
        raise InputError(
            f"{name}: a header of {header.size:,} bytes, above {_HEADER_BYTES:,}; pack the archive again"
        )
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
    """Limits the reads of zipfile.ZipFile, which reads the directory of an archive at once, of any size."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, n: int = -1) -> bytes:
        if n > _DIRECTORY_BYTES:
            raise InputError(
                f"{self._name}: a directory of {n:,} bytes, above {_DIRECTORY_BYTES:,}; split the archive"
            )
        return self._file.read(n)


def zip_members(name: str, file: BinaryIO, start: int = 0, end: int | None = None) -> Members:
    """Path and content of each regular file in a zip archive with its header at `start` to `end` - 1.

    An office document, which is a zip archive, has one member, a Rejected with an empty path. A member that
    cannot be opened is a Rejected, too.
    """
    with seekable(file) as source, unpack_errors(name), zipfile.ZipFile(_BoundedReads(name, source)) as archive:
        if document := _office_document(archive):
            if start == 0:
                yield "", Rejected("binary", f"{name}: {document}, not plain text; convert it")
            return
        for info in archive.infolist():
            # A damaged archive may have negative offsets: each member must be in one range.
            is_in_range = (start == 0 or info.header_offset >= start) and info.header_offset < (end or inf)
            if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or not is_in_range:
                continue
            member = f"{name}: {info.filename}"
            if info.compress_type not in _ZIP_METHODS:
                method = _OTHER_ZIP_METHODS.get(info.compress_type, f"method {info.compress_type}")
                problem = f"{member}: packed with {method}; pack the archive again with deflate"
                yield info.filename, Rejected("unreadable", problem)
                continue
            if info.flag_bits & _ENCRYPTED:
                problem = f"{member}: encrypted; unpack it, and pack it without a password"
                yield info.filename, Rejected("unreadable", problem)
                continue
            try:
                with unpack_errors(member), archive.open(info) as content:
                    yield info.filename, content
            except InputError as error:
                yield info.filename, Rejected("unreadable", str(error))


def _office_document(archive: zipfile.ZipFile) -> str | None:
    """Which document the archive is, or None if it is an ordinary archive."""
    names = set(archive.namelist())
    if "[Content_Types].xml" in names:
        for folder, kind in (("word/", "a Word"), ("xl/", "an Excel"), ("ppt/", "a PowerPoint")):
            if any(name.startswith(folder) for name in names):
                return f"{kind} document"
        return "an Office document"
    if "Index/Document.iwa" in names or "Index.zip" in names:
        return "an iWork document"
    if "META-INF/container.xml" in names:
        return "an EPUB book"
    first = archive.infolist()[0] if names else None
    if first and first.filename == "mimetype" and first.compress_type == zipfile.ZIP_STORED:
        with archive.open(first) as content:
            mime_type: Any = content.read(_MIME_TYPE_BYTES)
        if mime_type.startswith(b"application/epub"):
            return "an EPUB book"
        if mime_type.startswith(b"application/"):
            return "an OpenDocument file"
    return None

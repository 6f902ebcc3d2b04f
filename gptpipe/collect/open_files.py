"""Opens files as streams: plain, compressed or in an archive, local or at an fsspec address.

Nothing is extracted to disk. Memory is bounded for hostile files, too: each header, directory and dictionary
has a limit, which is checked before memory for it is allocated.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gptpipe.collect import archives, compression, file_kinds
from gptpipe.collect.file_kinds import Format
from gptpipe.collect.streams import OnRead, Stream, buffered, drain
from gptpipe.collect.tables import CHUNK, TooLargeError, check_growth, is_remote, read_errors
from gptpipe.collect.texts import Rejected
from gptpipe.shell.environment import optional_module
from gptpipe.shell.errors import InputError, first_line

_FREE_BYTES = 64 << 20  # what any file may expand to, however small it is
_HEAD_BYTES = max(archives.HEAD_BYTES, compression.HEAD_BYTES, file_kinds.HEAD_BYTES)
_MAX_DEPTH = 2  # archives in each other

# Name and content of each file, or why it is skipped. A content must be read before the next file is asked for.
Files = Iterator[tuple[str, io.BufferedReader | Rejected]]


class _Rules(NamedTuple):
    """What applies to every file in an archive."""

    is_wanted: Callable[[str], bool]  # for the path of a member
    on_read: OnRead  # is called with all bytes that are unpacked


def open_files(
    address: str,
    max_expansion: int,
    digests: dict[str, str],
    *,
    format_: Format = "text",
    members: str | None = None,
    start: int = 0,
    end: int | None = None,
) -> Files:
    """Name and content of a file, or of each file in an archive, in order; a Rejected for each one skipped.

    An archive is tar or zip; it and its files may be compressed, and it may contain archives, but these no
    further ones. Rejections name the file: `unreadable` for a member that cannot be opened; `other_file` for a
    member that does not match the glob `members` or, without it, the format (`is_other_file`); `nested_archive`
    for an archive that is too deep; `binary` for PDF and office documents. A path in an archive matches if the
    glob matches all of it; `*` also matches `/`, and `**/` may match nothing.

    `start` and `end` divide a local zip archive: only members are read whose header is at an offset from
    `start` up to, and without, `end` (None: the end of the file). Any other file belongs to the range that
    starts at 0.

    Raises InputError for damaged files, for formats that cannot be unpacked, and if the content is larger than
    `max_expansion` times the file. A remote file is read once; the SHA-256 of what was read is stored in
    `digests`. Call it inside `read_errors`.
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
        limit = growth_limit(n_in or Path(address).stat().st_size, max_expansion)
        check_growth(address, n_out, limit, max_expansion)

    rules = _Rules(partial(_is_wanted, format_, members), count_out)
    with _open(address) as raw:
        if not is_remote(address):
            yield from _part(address, raw, rules, start, end)
            return
        file: io.BufferedReader = io.BufferedReader(Stream(raw, count_in, partial(read_errors, address)), CHUNK)
        try:
            yield from _unpacked(address, file, rules, depth=0)
            drain(file)
        finally:  # also if a limit ends the source early
            digests[address] = sha256.hexdigest()


def is_packed(name: str, head: bytes) -> bool:
    """Whether a file that starts with `head` is compressed, an archive, or of a kind that cannot be read."""
    if file_kinds.is_text(head):
        return False
    is_archive = archives.is_tar(head) or archives.is_zip(head)
    is_compressed = compression.decompressor(head) is not None
    return is_archive or is_compressed or file_kinds.unreadable_kind(name, head) is not None


def growth_limit(n_in: int, max_expansion: int) -> int:
    """How many bytes a file of `n_in` bytes may expand to."""
    return max(_FREE_BYTES, max_expansion * n_in)


def _is_wanted(format_: Format, members: str | None, path: str) -> bool:
    if members is None:
        return not file_kinds.is_other_file(path, format_)
    path = path.replace("\\", "/").removeprefix("./")  # Windows programs write backslashes into zip archives
    pattern = members.removeprefix("./")
    return fnmatchcase(path, pattern) or fnmatchcase(path, pattern.replace("**/", ""))


def _part(name: str, file: io.BufferedReader, rules: _Rules, start: int, end: int | None) -> Files:
    """The files in the range of a local file."""
    if archives.is_zip(file.peek(_HEAD_BYTES)):
        yield from _members(name, archives.zip_members(name, file, start, end), rules, rules.on_read, depth=1)
    elif start == 0:
        yield from _unpacked(name, file, rules, depth=0)


def _unpacked(
    name: str, file: io.BufferedReader, rules: _Rules, depth: int, *, is_wanted: bool = True
) -> Files:
    """The file itself, or what is in it. `depth` is the number of archives around it.

    An archive is opened even if it is not wanted itself, because its members may be.
    """
    file = _decompressed(name, file, rules.on_read)
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    if archives.is_tar(head) or archives.is_zip(head):
        yield from _unpacked_archive(name, file, rules, depth)
    elif not is_wanted:
        yield name, Rejected("other_file", name)
    elif kind := file_kinds.unreadable_kind(name, head):
        raise InputError(f"{name}: {kind}, which cannot be read; unpack it, or pack it as zip, gz or zst")
    elif kind := file_kinds.document_kind(head):
        yield name, Rejected("binary", f"{name}: {kind}, not plain text; convert it")
    else:
        yield name, file


def _unpacked_archive(name: str, file: io.BufferedReader, rules: _Rules, depth: int) -> Files:
    if depth == _MAX_DEPTH:
        message = f"{name}: an archive inside {depth} archives; unpack the outer one"
        yield name, Rejected("nested_archive", message)
    elif archives.is_tar(file.peek(_HEAD_BYTES)):
        # Content of tar is not counted: it is not longer than the archive, which is counted or is the file.
        yield from _members(name, archives.tar_members(name, file), rules, lambda _: None, depth + 1)
    else:
        yield from _members(name, archives.zip_members(name, file), rules, rules.on_read, depth + 1)


def _members(name: str, members: archives.Members, rules: _Rules, on_read: OnRead, depth: int) -> Files:
    for path, content in members:
        member = f"{name}: {path}" if path else name
        if isinstance(content, Rejected):
            yield member, content
        elif file_kinds.is_system_file(path):
            yield member, Rejected("other_file", member)
        else:
            file = buffered(member, content, on_read)
            try:
                yield from _unpacked(member, file, rules, depth, is_wanted=rules.is_wanted(path))
            except TooLargeError:
                raise
            except InputError as error:
                yield member, Rejected("unreadable", str(error))


def _decompressed(name: str, file: io.BufferedReader, on_read: OnRead) -> io.BufferedReader:
    """The decompressed content of a file, or the file itself if it is not compressed."""
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    decompressor = None if file_kinds.is_text(head) else compression.decompressor(head)
    return buffered(name, decompressor(name, file), on_read) if decompressor else file


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
    except (ImportError, ValueError) as error:  # no package for s3 or gs, or an unknown protocol
        raise InputError(
            f"{address}: {first_line(error)}; for s3: pip install -e '.[s3]', for gs: '.[gs]'"
        ) from error
    return system, path

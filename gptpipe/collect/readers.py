"""Reads each kind of source as a stream of raw texts, in a fixed order.

Texts are passed in lists; passing them one by one costs as much as cleaning them. Memory holds one chunk or
document of a text file, one line of JSON, or one batch of rows of Parquet.
"""

import codecs
import glob
import hashlib
import io
import json
import os
import platform
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from gptpipe.base.files import sha256_of
from gptpipe.base.isolated import OpenFile, isolated
from gptpipe.collect.batch import Rejected
from gptpipe.collect.cleaning import cut, plain_line_ends
from gptpipe.collect.downloads import download
from gptpipe.collect.file_kinds import Format
from gptpipe.collect.open_files import growth_limit, open_files, remote_addresses
from gptpipe.collect.params import CollectParams, HuggingFace, Jsonl, Parquet, Python, Source, Text, Url
from gptpipe.collect.python_text import module_files, python_code, python_docs
from gptpipe.collect.streams import seekable
from gptpipe.collect.tables import CHUNK, Pieces, Texts, dataset_rows, is_remote, not_utf8, parquet_rows, read_errors
from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import InputError

_MEMORY = 1 << 30  # bytes that reading a Parquet file may use ...
_MEMORY_PER_BYTE = 16  # ... and these for each byte of the file
_HEAD_BYTES = 8192  # of a file, which show whether it is text
_JSON = json.JSONDecoder()
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read(source: Source, params: CollectParams, counts: Counter[str], digests: dict[str, str]) -> Texts:
    """All texts of a source. Longer texts are cut into pieces of at most `max_document_bytes`.

    `counts["cut"]` is the number of cuts, updated just before the list that begins with the pieces of a text.
    Digests of remote files, which `fingerprint` does not know, are added to `digests`. Raises InputError if the
    source cannot be read, ResourceError if it cannot be reached.
    """
    n_always_fit = params.max_document_bytes // 4  # characters, of at most 4 bytes each
    for texts in _texts(source, params, counts, digests):
        start = 0
        for i, text in enumerate(texts):
            if isinstance(text, str) and len(text) > n_always_fit:
                yield texts[start:i]
                yield _pieces(text, params, counts)
                start = i + 1
        yield texts[start:]


def _pieces(text: str, params: CollectParams, counts: Counter[str]) -> list[str]:
    pieces = cut(text, params.max_document_bytes)
    counts["cut"] += len(pieces) - 1
    return pieces


def _texts(source: Source, params: CollectParams, counts: Counter[str], digests: dict[str, str]) -> Texts:
    if isinstance(source, Python):
        read_package = python_docs if source.kind == "python-docs" else python_code
        yield from ([text] for text in read_package(source.package))
        return
    if isinstance(source, HuggingFace):
        address = _hub_address(source)
        arguments = (source.dataset, source.name, source.split, source.revision, source.text_column)
        yield from isolated(address, dataset_rows, address, *arguments)
        return
    for address in _addresses(source):
        with read_errors(address):
            for name, file in open_files(address, params.max_expansion, digests, format_=_format_of(source)):
                if isinstance(file, Rejected):
                    yield [file]
                    continue
                match source:
                    case Text() | Url(format="text"):
                        separator = "\n" if source.document == "line" else getattr(source, "separator", None)
                        yield from _text_file(name, file, separator, params, counts)
                    case Jsonl() | Url(format="jsonl"):
                        yield from _jsonl_file(name, file, source.text_key, params)
                    case Parquet(text_column=column) | Url(text_key=column):
                        yield from _parquet_file(name, file, column, params, counts)


def _format_of(source: Text | Jsonl | Parquet | Url) -> Format:
    return source.format if isinstance(source, Url) else source.kind


def fingerprint(sources: tuple[Source, ...]) -> dict[str, str]:
    """Name -> digest of the sources: SHA-256 of each local file, a revision, or the version of Python.

    Raises one InputError for all files that cannot be read.
    """
    digests: dict[str, str] = {}
    for source in sources:
        if isinstance(source, Python) and source.package is None:
            digests[source.kind] = f"{platform.python_implementation()} {platform.python_version()}"
        elif isinstance(source, Python):
            files = "".join(map(sha256_of, module_files(source.package)))
            digests[f"{source.kind} {source.package}"] = hashlib.sha256(files.encode()).hexdigest()
        elif isinstance(source, HuggingFace):
            digests[_hub_address(source)] = source.revision
        elif isinstance(source, Url):
            digests[source.url] = source.sha256
    patterns = [pattern for source in sources if isinstance(source, Text | Jsonl | Parquet) for pattern in source.paths]
    for path in matching_files(pattern for pattern in patterns if not is_remote(pattern)):
        with read_errors(str(path)):
            digests[os.fsencode(path).decode(errors="backslashreplace")] = sha256_of(path)
    return digests


def _addresses(source: Text | Jsonl | Parquet | Url) -> list[str]:
    """Paths of local files, then addresses of remote ones; a `url` source is downloaded first."""
    if isinstance(source, Url):
        return [str(download(source.url, source.sha256))]
    local = [pattern for pattern in source.paths if not is_remote(pattern)]
    remote = {address for pattern in source.paths if is_remote(pattern) for address in remote_addresses(pattern)}
    return [*map(str, matching_files(local)), *sorted(remote)]


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The regular files that match the globs, sorted, each once. Raises one InputError for all that is wrong."""
    names: set[str] = set()
    problems: list[str] = []
    for pattern in patterns:
        matches, problems_of_pattern = _match(pattern)
        names.update(matches)
        problems += problems_of_pattern
    paths = sorted(map(Path, names))
    for path in paths:
        try:
            if stat.S_ISREG(path.stat().st_mode):
                path.open("rb").close()
            else:
                problems.append(f"{path}: not a regular file")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    if problems:
        raise InputError("; ".join(problems) + "; fix collect.sources in params.yaml, or the files")
    return paths


def _match(pattern: str) -> tuple[list[str], list[str]]:
    """The names that match a glob, folders excluded, and what is wrong with the pattern or the names."""
    links = _links_to_folders(pattern)
    if links:
        return [], [f"{link}: a link to a folder, which could lead in circles" for link in links]
    # glob.glob, unlike Path.glob, accepts absolute patterns.
    names = [name for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir()]  # noqa: PTH207
    problems = [f"{folder}: Permission denied" for folder in _unreadable_folders(Path(pattern))]
    if not names and not problems:
        problems.append(f"{pattern}: " + ("a folder, not a file" if Path(pattern).is_dir() else "no file matches"))
    project = project_root().resolve()
    start = Path(re.split(r"[*?[]", pattern)[0] + "x").parent.resolve()  # the last folder before a wildcard
    for name in sorted(names):
        target = Path(os.path.realpath(name))
        if not (target.is_relative_to(project) or target.is_relative_to(start)):
            problems.append(f"{name}: a link that leads out of {start} and of the project, to {target}")
    return names, problems


def _links_to_folders(pattern: str) -> list[str]:
    """Links that `**` would follow. With a few links that point upwards, glob would practically never end."""
    before, recursive, _ = pattern.partition("**")
    if not recursive:
        return []
    links: list[str] = []
    for start in sorted(glob.glob(before or ".")):  # noqa: PTH207
        for folder, names, _ in os.walk(start):
            names[:] = sorted(name for name in names if not name.startswith("."))  # as glob does
            paths = [os.path.join(folder, name) for name in names]  # noqa: PTH118
            links += [path for path in paths if os.path.islink(path)]  # noqa: PTH114
    return links


def _unreadable_folders(pattern: Path) -> list[str]:
    """Folders that glob skips silently, because this process may not list them or go through them."""
    unreadable: set[str] = set()
    for below, above in pairwise([pattern, *pattern.parents]):
        needed = os.R_OK | os.X_OK if glob.has_magic(below.name) else os.X_OK
        folders = filter(os.path.isdir, glob.glob(str(above), recursive=True))  # noqa: PTH207
        unreadable |= {folder for folder in folders if not os.access(folder, needed)}
    return sorted(unreadable)


def _text_file(
    name: str, file: io.BufferedReader, separator: str | None, params: CollectParams, counts: Counter[str]
) -> Texts:
    """Documents of a text file: the whole file, or the parts between separators; long ones in pieces."""
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    if not head.startswith(_UTF16_MARKS) and b"\0" in head:
        yield [Rejected("binary", name)]
        return
    rest = ""
    for chunk in _decoded(name, file, params.encoding_errors):
        rest += chunk
        if separator is not None:
            *documents, rest = rest.split(plain_line_ends(separator))
            yield documents
        if len(rest) > params.max_document_bytes:
            *pieces, rest = _pieces(rest, params, counts)
            yield pieces
    if rest or separator is None:
        yield [rest]


def _decoded(name: str, file: BinaryIO, errors: str) -> Iterator[str]:
    """The file's text in chunks, with plain line ends. Raises InputError at the first byte that is not UTF-8."""
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
        yield text if n_decoded else text.removeprefix("\ufeff")
        if invalid:
            raise not_utf8(name, n_decoded + invalid.start, head) from invalid
        if not data:
            return
        n_read += len(data)
        n_decoded = n_read - len(utf8.getstate()[0])


def _jsonl_file(name: str, file: BinaryIO, key: str, params: CollectParams) -> Texts:
    """One text for each line that is not blank; about a chunk of the file in a list."""
    max_line_bytes = (1 << 20) + 16 * params.max_document_bytes
    texts: list[str | Rejected] = []
    number = offset = 0  # of the current line, and of the byte after it
    next_yield = 0  # offset
    while line := file.readline(max_line_bytes):
        number += 1
        start = offset
        offset += len(line)
        if len(line) == max_line_bytes and not line.endswith(b"\n"):
            offset += _skip_line(file)
            texts.append(Rejected("line_too_long", f"{name}, line {number}"))
            continue
        try:
            content = line.decode(errors=params.encoding_errors).removeprefix("\ufeff").strip(" \t\r\n")
            value = _parse_json(content) if content else None
        except UnicodeDecodeError as error:
            yield texts  # a limit of the source may end before the error
            raise not_utf8(name, start + error.start, line) from error
        except (ValueError, RecursionError) as error:
            yield texts
            raise InputError(f"{name}, line {number}: not JSON: {error}; fix or remove the line") from error
        text = value.get(key) if isinstance(value, dict) else None
        if content:
            texts.append(text if isinstance(text, str) else Rejected("no_text", f"{name}, line {number}"))
        if offset >= next_yield:
            yield texts
            texts, next_yield = [], offset + CHUNK
    yield texts


def _skip_line(file: BinaryIO) -> int:
    """Read the rest of a line; returns its bytes."""
    n_bytes = 0
    while chunk := file.readline(CHUNK):
        n_bytes += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return n_bytes


def _parse_json(content: str) -> Any:
    value, end = _JSON.raw_decode(content)
    if end < len(content):
        raise ValueError(f"more text after its end, character {end}")
    return value


def _parquet_file(name: str, file: BinaryIO, column: str, params: CollectParams, counts: Counter[str]) -> Texts:
    with seekable(file) as source:
        n_in = source.seek(0, os.SEEK_END)
        limit = growth_limit(n_in, params.max_expansion)
        memory = _MEMORY + _MEMORY_PER_BYTE * n_in
        limits = (limit, params.max_expansion, params.max_document_bytes)
        arguments = (name, OpenFile(source), column, params.encoding_errors, *limits)
        for texts in isolated(name, parquet_rows, *arguments, memory=memory):
            if isinstance(texts, Pieces):
                counts["cut"] += texts.n_cuts
            yield texts


def _hub_address(source: HuggingFace) -> str:
    return f"huggingface://{source.dataset}/{source.name or 'default'}/{source.split}"

"""Where text comes from: each kind of source as a stream of raw texts, in a fixed order.

Texts go by lists, of what was read together: the way of each text alone would cost as much as cleaning it. Held in
memory at a time: a chunk or a document of a text file, a line of JSON, or a batch of rows of Parquet.
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
from typing import BinaryIO

from gptpipe.base.files import sha256_of
from gptpipe.base.isolated import OpenFile, isolated
from gptpipe.collect.batch import Rejected
from gptpipe.collect.cleaning import cut, plain_line_ends
from gptpipe.collect.downloads import download
from gptpipe.collect.open_files import growth_limit, open_files, remote_addresses, seekable
from gptpipe.collect.params import CollectParams, HuggingFace, Jsonl, Parquet, Python, Source, Text, Url
from gptpipe.collect.python_text import module_files, python_code, python_docs
from gptpipe.collect.tables import CHUNK, Texts, dataset_rows, is_remote, not_utf8, parquet_rows, read_errors
from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import InputError

_MEMORY, _MEMORY_PER_BYTE = 1 << 30, 16  # bytes to read a Parquet file: these, and this many per byte of the file
_SNIFFED = 8192  # bytes that decide whether a file is text
_JSON = json.JSONDecoder()
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read(source: Source, params: CollectParams, counts: Counter[str], digests: dict[str, str]) -> Texts:
    """All texts of a source, each of at most `max_document_bytes`; notes in `counts` how often one was `cut` for that,
    just before the list that begins with its pieces, and in `digests` what `fingerprint` could not know.

    Raises InputError for what cannot be read, ResourceError for what cannot be reached.
    """
    most = params.max_document_bytes // 4  # characters that need no closer look
    for texts in _texts(source, params, counts, digests):
        start = 0
        for i, text in enumerate(texts):
            if isinstance(text, str) and len(text) > most:
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
        texts = (python_docs if source.kind == "python-docs" else python_code)(source.package)
        yield from ([text] for text in texts)
        return
    if isinstance(source, HuggingFace):
        address = _hub_address(source)
        about = (source.dataset, source.name, source.split, source.revision, source.text_column)
        yield from isolated(address, dataset_rows, address, *about)
        return
    for address in _addresses(source):
        with read_errors(address):
            for name, file in open_files(address, params.max_expansion, digests):
                match source:
                    case Text() | Url(format="text"):
                        separator = "\n" if source.document == "line" else getattr(source, "separator", None)
                        yield from _text_file(name, file, separator, params, counts)
                    case Jsonl() | Url(format="jsonl"):
                        yield from _jsonl_file(name, file, source.text_key, params)
                    case Parquet(text_column=column) | Url(text_key=column):
                        yield from _parquet_file(name, file, column, params)


def fingerprint(sources: tuple[Source, ...]) -> dict[str, str]:
    """What the sources' text was, as name -> digest: SHA-256 of each local file, or the version of Python.

    Raises InputError that names every file that cannot be read.
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
    """Local files, then remote ones; a download is fetched."""
    if isinstance(source, Url):
        return [str(download(source.url, source.sha256))]
    local = [pattern for pattern in source.paths if not is_remote(pattern)]
    remote = {address for pattern in source.paths if is_remote(pattern) for address in remote_addresses(pattern)}
    return [*map(str, matching_files(local)), *sorted(remote)]


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The regular files that the globs name, sorted, each once. Raises InputError that names all that is wrong."""
    faults: list[str] = []
    found: set[str] = set()
    project = project_root().resolve()
    for pattern in patterns:
        if links := _links_to_folders(pattern):
            faults += [f"{link}: a link to a folder, which could lead in circles" for link in links]
            continue
        names = [name for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir()]  # noqa: PTH207  takes absolute patterns too
        faults += (closed := [f"{folder}: Permission denied" for folder in _closed_folders(Path(pattern))])
        if not names and not closed:
            faults.append(f"{pattern}: " + ("a folder, not a file" if Path(pattern).is_dir() else "no file matches"))
        homes = (project, Path(re.split(r"[*?[]", pattern)[0] + "x").parent.resolve())
        for name, real in sorted((name, Path(os.path.realpath(name))) for name in names):
            if not any(map(real.is_relative_to, homes)):
                faults.append(f"{name}: a link that leads out of {homes[1]} and of the project, to {real}")
        found.update(names)
    for path in sorted(map(Path, found)):
        try:
            if stat.S_ISREG(path.stat().st_mode):
                path.open("rb").close()
            else:
                faults.append(f"{path}: not a regular file")
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
    if faults:
        raise InputError("; ".join(faults) + "; mend collect.sources in params.yaml, or the files")
    return sorted(map(Path, found))


def _links_to_folders(pattern: str) -> list[str]:
    """Links that `**` would follow: a few that point upwards keep glob busy for ever."""
    before, recursive, _ = pattern.partition("**")
    links: list[str] = []
    for start in sorted(glob.glob(before or ".")) if recursive else []:  # noqa: PTH207
        for folder, names, _ in os.walk(start):
            names[:] = sorted(name for name in names if not name.startswith("."))  # as glob does
            links += [path for name in names if os.path.islink(path := os.path.join(folder, name))]  # noqa: PTH114, PTH118
    return links


def _closed_folders(pattern: Path) -> list[str]:
    """Folders that glob passes over in silence: those that the pattern lists or goes through, without the right to."""
    closed: set[str] = set()
    for below, above in pairwise([pattern, *pattern.parents]):
        needed = os.R_OK | os.X_OK if glob.has_magic(below.name) else os.X_OK
        folders = filter(os.path.isdir, glob.glob(str(above), recursive=True))  # noqa: PTH207
        closed |= {folder for folder in folders if not os.access(folder, needed)}
    return sorted(closed)


def _text_file(
    name: str, file: io.BufferedReader, separator: str | None, params: CollectParams, counts: Counter[str]
) -> Texts:
    """Documents of a text file: the whole of it, or what stands between separators; a long one in pieces."""
    head = file.peek(_SNIFFED)[:_SNIFFED]
    if not head.startswith(_UTF16_MARKS) and (b"\0" in head or head.startswith(b"%PDF-")):
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
    offset = read = 0  # of the first byte that is not decoded yet, and of the first not read
    while True:
        data, fault = file.read(CHUNK), None
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            fault = error
            text = decoder.decode(data[: max(0, error.start - (read - offset))])  # a limit may lie before the error
        yield text if offset else text.removeprefix("\ufeff")
        if fault:
            raise not_utf8(name, offset + fault.start) from fault
        if not data:
            return
        read += len(data)
        offset = read - len(utf8.getstate()[0])


def _jsonl_file(name: str, file: BinaryIO, key: str, params: CollectParams) -> Texts:
    longest = (1 << 20) + 16 * params.max_document_bytes  # of a line held in memory
    texts: list[str | Rejected] = []
    offset = number = due = 0
    while line := file.readline(longest):
        number, start, offset = number + 1, offset, offset + len(line)
        if len(line) == longest and not line.endswith(b"\n"):
            while rest := file.readline(CHUNK):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            texts.append(Rejected("line_too_long", f"{name}, line {number}"))
            continue
        try:
            content = line.decode(errors=params.encoding_errors).removeprefix("\ufeff").strip(" \t\r\n")
            value, end = _JSON.raw_decode(content) if content else (None, 0)
            if end < len(content):
                raise ValueError(f"more behind its end, character {end}")
        except UnicodeDecodeError as error:
            yield texts  # a limit may lie before the error
            raise not_utf8(name, start + error.start) from error
        except (ValueError, RecursionError) as error:
            yield texts
            raise InputError(f"{name}, line {number}: not JSON: {error}; mend or remove the line") from error
        text = value.get(key) if isinstance(value, dict) else None
        if content:
            texts.append(text if isinstance(text, str) else Rejected("no_text", f"{name}, line {number}"))
        if offset >= due:
            yield texts
            texts, due = [], offset + CHUNK
    yield texts


def _parquet_file(name: str, opened: BinaryIO, column: str, params: CollectParams) -> Texts:
    with seekable(opened) as whole:
        n_in = whole.seek(0, os.SEEK_END)
        limit = growth_limit(n_in, params.max_expansion)
        memory = _MEMORY + _MEMORY_PER_BYTE * n_in
        arguments = (name, OpenFile(whole), column, params.encoding_errors, limit, params.max_expansion)
        yield from isolated(name, parquet_rows, *arguments, memory=memory)


def _hub_address(source: HuggingFace) -> str:
    return f"huggingface://{source.dataset}/{source.name or 'default'}/{source.split}"

"""Where text comes from: each kind of source as a stream of raw texts, in a fixed order.

Held in memory at a time: a document of a text file, a line of JSON, or a batch of rows of Parquet.
"""

import codecs
import glob
import io
import json
import os
import platform
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gptpipe.config import CollectParams, Jsonl, Parquet, PythonDocs, Source, Text
from gptpipe.corpus.cleaning import Rejected, cut, plain_line_ends
from gptpipe.corpus.opening import CHUNK, is_remote, open_files, read_errors, remote_addresses, seekable
from gptpipe.corpus.python_docs import python_docs
from gptpipe.errors import InputError, first_line
from gptpipe.files import sha256_of

_BATCH_BYTES = 16 << 20  # of rows of Parquet in memory, about
_SNIFFED = 8192  # bytes that decide whether a file is text
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# Texts, and a Rejected in place of each that is not one; never raised here, so the stream goes on behind it.
Texts = Iterator["str | Rejected"]


def read(source: Source, params: CollectParams, counts: Counter[str], digests: dict[str, str]) -> Texts:
    """All texts of a source, each of at most `max_document_bytes`; notes in `counts` how often one was `cut` for that,
    and in `digests` what `fingerprint` could not know.

    Raises InputError for what cannot be read, ResourceError for what cannot be reached.
    """
    for text in _texts(source, params, counts, digests):
        if isinstance(text, Rejected) or not text:
            yield text
        else:
            yield from _pieces(text, params, counts)


def _pieces(text: str, params: CollectParams, counts: Counter[str]) -> list[str]:
    pieces = cut(text, params.max_document_bytes)
    counts["cut"] += len(pieces) - 1
    return pieces


def _texts(source: Source, params: CollectParams, counts: Counter[str], digests: dict[str, str]) -> Texts:
    if isinstance(source, PythonDocs):
        yield from python_docs()
        return
    for address in _addresses(source.paths):
        with read_errors(address):
            for name, file in open_files(address, params.max_expansion, digests):
                match source:
                    case Text():
                        separator = {"file": None, "line": "\n", "separator": source.separator}[source.document]
                        yield from _text_file(name, file, separator, params, counts)
                    case Jsonl():
                        yield from _jsonl_file(name, file, source.text_key, params)
                    case Parquet():
                        yield from _parquet_file(name, file, source.text_column, params)


def fingerprint(sources: tuple[Source, ...]) -> dict[str, str]:
    """What the sources' text was, as name -> digest: SHA-256 of each local file, or the version of Python.

    Raises InputError that names every file that cannot be read.
    """
    digests: dict[str, str] = {}
    if any(isinstance(source, PythonDocs) for source in sources):
        digests["python-docs"] = f"{platform.python_implementation()} {platform.python_version()}"
    patterns = [pattern for source in sources if not isinstance(source, PythonDocs) for pattern in source.paths]
    for address in _addresses(patterns):
        if not is_remote(address):
            with read_errors(address):
                digests[os.fsencode(address).decode(errors="backslashreplace")] = sha256_of(Path(address))
    return digests


def _addresses(patterns: Iterable[str]) -> list[str]:
    """Local files, then remote ones."""
    local = [pattern for pattern in patterns if not is_remote(pattern)]
    remote = {address for pattern in patterns if is_remote(pattern) for address in remote_addresses(pattern)}
    return [*map(str, matching_files(local)), *sorted(remote)]


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The regular files that the globs name, sorted, each once. Raises InputError that names all that is wrong."""
    faults: list[str] = []
    found: set[str] = set()
    for pattern in patterns:
        if links := _links_to_folders(pattern):
            faults += [f"{link}: a link to a folder, which could lead in circles" for link in links]
            continue
        names = [name for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir()]  # noqa: PTH207  takes absolute patterns too
        if not names:
            faults.append(f"{pattern}: " + ("a folder, not a file" if Path(pattern).is_dir() else "no file matches"))
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


def _not_utf8(name: str, offset: int) -> InputError:
    mend = "convert the file, or set collect.encoding_errors to replace"
    return InputError(f"{name}: not UTF-8 at byte {offset}; {mend}")


def _text_file(
    name: str, file: io.BufferedReader, separator: str | None, params: CollectParams, counts: Counter[str]
) -> Texts:
    """Documents of a text file: the whole of it, or what stands between separators; a long one in pieces."""
    head = file.peek(_SNIFFED)[:_SNIFFED]
    if not head.startswith(_UTF16_MARKS) and (b"\0" in head or head.startswith(b"%PDF-")):
        yield Rejected("binary")
        return
    rest = ""
    for chunk in _decoded(name, file, params.encoding_errors):
        rest += chunk
        if separator is not None:
            *documents, rest = rest.split(plain_line_ends(separator))
            yield from documents
        if len(rest) > params.max_document_bytes:
            *pieces, rest = _pieces(rest, params, counts)
            yield from pieces
    if rest or separator is None:
        yield rest


def _decoded(name: str, file: BinaryIO, errors: str) -> Iterator[str]:
    """The file's text in chunks, with plain line ends. Raises InputError at the first byte that is not UTF-8."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors)
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset = read = 0  # of the first byte that is not decoded yet, and of the first not read
    while True:
        data = file.read(CHUNK)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, offset + error.start) from error
        yield text if offset else text.removeprefix("\ufeff")
        if not data:
            return
        read += len(data)
        offset = read - len(utf8.getstate()[0])


def _jsonl_file(name: str, file: BinaryIO, key: str, params: CollectParams) -> Texts:
    longest = CHUNK + 16 * params.max_document_bytes  # of a line held in memory
    offset = number = 0
    while line := file.readline(longest):
        number, start, offset = number + 1, offset, offset + len(line)
        if len(line) == longest and not line.endswith(b"\n"):
            while rest := file.readline(CHUNK):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield Rejected("line_too_long")
        elif line.strip():
            try:
                value: Any = json.loads(line.decode(errors=params.encoding_errors).removeprefix("\ufeff"))
            except UnicodeDecodeError as error:
                raise _not_utf8(name, start + error.start) from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{name}, line {number}: not JSON: {error}; mend or remove the line") from error
            text = value.get(key) if isinstance(value, dict) else None
            yield text if isinstance(text, str) else Rejected("no_text")


def _parquet_file(name: str, opened: BinaryIO, column: str, params: CollectParams) -> Texts:
    try:
        with seekable(opened) as whole, pq.ParquetFile(whole, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise InputError(f"{name}: no column `{column}` among {names}; set text_column of the source")
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{name}: column `{column}` holds {kind}, not text; set text_column of the source")
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            widest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
            for batch in file.iter_batches(max(1, min(1024, _BATCH_BYTES // (widest + 1))), columns=[column]):
                for content in batch.column(0).cast(pa.large_binary()).to_pylist():  # Parquet does not check UTF-8
                    yield Rejected("no_text") if content is None else content.decode(errors=params.encoding_errors)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: column `{column}` is not UTF-8; mend the file, or set collect.encoding_errors to replace"
        ) from error
    except pa.ArrowException as error:
        raise InputError(f"{name}: not a readable Parquet file: {first_line(error)}; replace the file") from error

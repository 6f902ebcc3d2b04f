"""Where text comes from: each kind of source as a stream of raw texts, in a fixed order and in bounded memory."""

import codecs
import glob
import json
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gptpipe.config import CollectParams, Jsonl, Parquet, PythonDocs, Source, Text
from gptpipe.corpus.cleaning import Rejected, cut
from gptpipe.corpus.python_docs import python_docs
from gptpipe.errors import InputError
from gptpipe.files import sha256_of

_CHUNK = 1 << 20  # bytes read at once
_SNIFFED = 8192  # bytes that decide whether a file is text
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# Texts, and a Rejected in place of each that is not one; never raised here, so the stream goes on behind it.
Texts = Iterator["str | Rejected"]


def read(source: Source, params: CollectParams) -> Texts:
    """All texts of a source. Raises InputError for what cannot be read."""
    match source:
        case PythonDocs():
            yield from python_docs()
        case Text():
            separator = {"file": None, "line": "\n", "separator": source.separator}[source.document]
            for path in matching_files(source.paths):
                yield from _text_file(path, separator, params)
        case Jsonl():
            for path in matching_files(source.paths):
                yield from _jsonl_file(path, source.text_key, params)
        case Parquet():
            for path in matching_files(source.paths):
                yield from _parquet_file(path, source.text_column)


def fingerprint(source: Source) -> dict[str, str]:
    """What the source's text was, as name -> digest: SHA-256 of each file, or the version of Python."""
    if isinstance(source, PythonDocs):
        return {"python-docs": f"{platform.python_implementation()} {platform.python_version()}"}
    return {path.as_posix(): sha256_of(path) for path in matching_files(source.paths)}


def matching_files(patterns: tuple[str, ...]) -> list[Path]:
    """The regular files that the globs name, sorted, each once. Raises InputError that names all that is wrong."""
    faults: list[str] = []
    found: set[str] = set()
    for pattern in patterns:
        names = [name for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir()]  # noqa: PTH207  takes absolute patterns too
        if not names:
            faults.append(f"{pattern}: no file matches")
        found.update(names)
    for name in sorted(found):
        try:
            is_regular = stat.S_ISREG(os.stat(name).st_mode)  # noqa: PTH116  one call for all three faults
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
        else:
            if not is_regular:
                faults.append(f"{name}: not a regular file")
            elif not os.access(name, os.R_OK):
                faults.append(f"{name}: no permission to read")
    if faults:
        raise InputError("; ".join(faults) + "; mend collect.sources in params.yaml, or the files")
    return sorted(map(Path, found))


def _text_file(path: Path, separator: str | None, params: CollectParams) -> Texts:
    """Documents of a text file: the whole of it, or what stands between separators."""
    with path.open("rb") as file:
        head = file.peek(_SNIFFED)[:_SNIFFED]
    if not head.startswith(_UTF16_MARKS) and (b"\0" in head or head.startswith(b"%PDF-")):
        yield Rejected("binary")
        return
    rest = ""
    for chunk in _decoded(path, params.encoding_errors):
        rest += chunk
        if separator is not None:
            *documents, rest = rest.split(separator)
            yield from documents
        if len(rest) > params.max_document_bytes:
            *pieces, rest = cut(rest, params.max_document_bytes)
            yield from pieces
    if rest or separator is None:
        yield rest


def _decoded(path: Path, errors: str) -> Iterator[str]:
    """The file's text in chunks. Raises InputError with the offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0  # of the first byte that the decoder has not turned into text
    with path.open("rb") as file:
        while True:
            data = file.read(_CHUNK)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: not UTF-8 at byte {offset + error.start}; convert the file, "
                    "or set collect.encoding_errors to replace"
                ) from error
            if text:
                yield text
            if not data:
                return
            offset = file.tell() - len(decoder.getstate()[0])


def _jsonl_file(path: Path, key: str, params: CollectParams) -> Texts:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                decoded = line.decode("utf-8-sig" if number == 1 else "utf-8", errors=params.encoding_errors)
                value: Any = json.loads(decoded)
            except UnicodeDecodeError as error:
                offset = file.tell() - len(line) + error.start
                raise InputError(
                    f"{path}: not UTF-8 at byte {offset}; convert the file, or set collect.encoding_errors to replace"
                ) from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON: {error}; mend or remove the line") from error
            text = value.get(key) if isinstance(value, dict) else None
            yield text if isinstance(text, str) else Rejected("no_text")


def _parquet_file(path: Path, column: str) -> Texts:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path}: no column `{column}` among {names}; set text_column of the source")
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{path}: column `{column}` holds {kind}, not text; set text_column of the source")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield Rejected("no_text") if text is None else text
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {first_line(error)}; replace the file") from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

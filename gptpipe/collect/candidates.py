"""Step 1 of collect: reads one part, cleans its texts, and writes those that may become documents to disk.

A part has a folder with these files:

- `documents.arrow`: a row for each candidate: `id` (32 bytes), `text` and `n_bytes`.
- `texts.arrow`: a row for each text that was read: `key` (first 8 bytes of the id), `n_bytes`, `reason` (0 for
  a candidate, else a position in the record's `reasons`, counted from 1), and `is_piece`. 18 bytes a text.
- `signatures.bin`, `bands.bin`: for near-duplicates, see `gptpipe.collect.near_duplicates`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.base.files import new_file
from gptpipe.base.pages import snippet
from gptpipe.base.resume import once
from gptpipe.collect.cleaning import clean
from gptpipe.collect.near_duplicates import SignatureWriter
from gptpipe.collect.params import CollectParams, Source
from gptpipe.collect.parts import Part
from gptpipe.collect.readers import read_part
from gptpipe.collect.texts import Piece, Rejected, contains_rejected, lengths
from gptpipe.shell.errors import one_line

_DOCUMENTS = "documents.arrow"
_TEXTS = "texts.arrow"
_CANDIDATE = pa.schema([("id", pa.binary(32)), ("text", pa.string()), ("n_bytes", pa.int64())])
_TEXT = pa.schema(
    [("key", pa.uint64()), ("n_bytes", pa.int64()), ("reason", pa.uint8()), ("is_piece", pa.uint8())]
)
_BATCH_CHARACTERS = 1 << 18  # about; a batch is cleaned together
_BATCH_TEXTS = 1 << 13  # most in a batch
MAX_EXAMPLES = 3  # of each reason in each source: the first
_EXAMPLE_CHARACTERS = 200
_MAX_BAD = 100  # bad records of a part that are described


class Example(NamedTuple):
    """A rejected text in the report."""

    position: int  # of the text in its part
    reason: str
    detail: str
    start: str  # of the text

    @classmethod
    def of(cls, position: int, rejected: Rejected, text: str | Rejected) -> "Example":
        start = snippet(text, _EXAMPLE_CHARACTERS) if isinstance(text, str) else "(not a text)"
        return cls(position, rejected.reason, one_line(rejected.detail), start)


class Candidates(NamedTuple):
    """What step 1 made of a part. The arrays have an entry for each text, and are mapped from disk."""

    folder: Path
    record: dict[str, Any]
    keys: npt.NDArray[np.uint64]
    n_bytes: npt.NDArray[np.int64]
    reasons: npt.NDArray[np.uint8]
    is_piece: npt.NDArray[np.uint8]

    @classmethod
    def open(cls, folder: Path, record: dict[str, Any]) -> "Candidates":
        with pa.memory_map(str(folder / _TEXTS)) as file:
            table = pa.ipc.open_file(file).read_all()
        return cls(folder, record, *(table[name].to_numpy() for name in _TEXT.names))

    @property
    def is_cut_short(self) -> bool:
        """Whether the part has more texts, which were not read because of a limit of the source."""
        return bool(self.record["is_cut_short"])

    def rejections(self, n_texts: int) -> dict[str, int]:
        """Numbers of rejected texts among the first `n_texts`, by reason."""
        counts = np.bincount(self.reasons[:n_texts], minlength=1 + len(self.record["reasons"]))[1:]
        return {reason: int(n) for reason, n in zip(self.record["reasons"], counts, strict=True) if n}

    def examples(self, n_texts: int) -> list[Example]:
        """Examples of rejected texts among the first `n_texts`."""
        return [example for row in self.record["examples"] if (example := Example(*row)).position < n_texts]

    def bad_records(self, n_texts: int) -> list[str]:
        """What is wrong with the bad records among the first `n_texts`; with the first 100 of the part."""
        return [detail for position, detail in self.record["bad"] if position < n_texts]


def read_candidates(folder: Path, batch_starts: list[int], rows: npt.NDArray[np.int64]) -> pa.Table:
    """The candidates of a part at these ascending rows; reads only the record batches that contain one."""
    batches = []
    with pa.memory_map(str(folder / _DOCUMENTS)) as file:
        reader = pa.ipc.open_file(file)
        numbers = np.searchsorted(batch_starts, rows, side="right") - 1
        for number in np.unique(numbers):
            taken = rows[numbers == number] - batch_starts[number]
            batches.append(reader.get_batch(int(number)).take(pa.array(taken)))
    return pa.Table.from_batches(batches, _CANDIDATE)


def find_candidates(part: Part, *, folder: Path, params: CollectParams) -> tuple[Part, dict[str, Any]]:
    """Write the candidates of a part below `folder`, unless an interrupted run already did.

    Runs in a worker process. Returns the part and the record for `Candidates.open`. Raises ResourceError.
    """
    target = folder / part.name
    names = [_TEXTS, _DOCUMENTS, *(SignatureWriter.FILES if params.dedup == "near" else ())]
    work = partial(_write_candidates, part, target, params)
    record = work() if part.is_remote else once([target / name for name in names], work)
    return part, record


def _write_candidates(part: Part, target: Path, params: CollectParams) -> dict[str, Any]:
    source = params.sources[part.source]
    max_documents = part.more * (source.max_documents or inf)
    max_bytes = part.more * (source.max_bytes or inf)
    digests: dict[str, str] = {}
    log = _TextLog()
    batch_starts = [0]
    n_documents = n_bytes = 0
    is_cut_short = False
    signatures = SignatureWriter(target) if params.dedup == "near" else None
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with new_file(target / _DOCUMENTS) as file, pa.ipc.new_file(file, _CANDIDATE, options=options) as documents:
        max_texts = int(min(_BATCH_TEXTS, max_documents))
        for texts in _batches(read_part(part, source, params, digests), max_texts):
            rows = _clean(texts, log, source, params)
            documents.write_batch(rows)
            if signatures:
                signatures.add(rows["text"])
            n_documents += len(rows)
            n_bytes += log.n_bytes_of_last
            batch_starts.append(n_documents)
            if n_documents >= max_documents or n_bytes >= max_bytes:
                is_cut_short = True
                break
    if signatures:
        signatures.close()
    with new_file(target / _TEXTS) as file, pa.ipc.new_file(file, _TEXT) as table:
        table.write_table(log.table())
    return {
        "n_texts": log.n_texts,
        "batch_starts": batch_starts[:-1],
        "reasons": list(log.reasons),
        "examples": log.examples,
        "bad": log.bad,
        "digests": digests,
        "is_cut_short": is_cut_short,
    }


def _batches(lists: Iterator[Sequence[str | Rejected]], max_texts: int) -> Iterator[list[str | Rejected]]:
    """The texts in lists of at most `max_texts`.

    A list has fewer than 2 * _BATCH_CHARACTERS unless one text is longer.
    """
    batch: list[str | Rejected] = []
    n_characters = 0
    for texts in chain.from_iterable(_divided(texts, max_texts) for texts in lists):
        if len(batch) + len(texts) > max_texts:
            yield batch
            batch, n_characters = [], 0
        batch += texts
        n_characters += sum(lengths(texts))
        if n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _divided(texts: Sequence[str | Rejected], max_texts: int) -> Iterator[Sequence[str | Rejected]]:
    """The list itself, or its texts one by one if a batch is too small for it."""
    if len(texts) <= max_texts and sum(lengths(texts)) < _BATCH_CHARACTERS:
        yield texts
    else:
        yield from ([text] for text in texts)


class _TextLog:
    """One entry for each text that was read, and examples of the rejected ones."""

    def __init__(self) -> None:
        self.n_texts = 0
        self.n_bytes_of_last = 0  # of the candidates in the last batch
        self.reasons: dict[str, int] = {}  # reason -> its number
        self.examples: list[Example] = []
        self.bad: list[tuple[int, str]] = []
        self._n_rejected = Counter[str]()
        self._batches: list[pa.RecordBatch] = []

    def add(
        self, texts: list[str | Rejected], rejected: dict[int, Rejected], digests: bytes, n_bytes: list[int]
    ) -> None:
        """Log a batch: the raw texts, the rejected ones by position, and id and size of the others."""
        reasons = np.zeros(len(texts), np.uint8)
        for i, text in rejected.items():
            reasons[i] = self.reasons.setdefault(text.reason, 1 + len(self.reasons))
            self._describe(self.n_texts + i, text, texts[i])
        is_candidate = reasons == 0
        keys = np.zeros(len(texts), np.uint64)
        keys[is_candidate] = np.frombuffer(digests, np.uint64)[::4]
        sizes = np.zeros(len(texts), np.int64)
        sizes[is_candidate] = n_bytes
        is_piece = np.zeros(len(texts), np.uint8)
        if Piece in set(map(type, texts)):
            is_piece[:] = [isinstance(text, Piece) for text in texts]
        columns = [pa.array(values) for values in (keys, sizes, reasons, is_piece)]
        self._batches.append(pa.RecordBatch.from_arrays(columns, schema=_TEXT))
        self.n_texts += len(texts)
        self.n_bytes_of_last = sum(n_bytes)

    def _describe(self, position: int, rejected: Rejected, text: str | Rejected) -> None:
        self._n_rejected[rejected.reason] += 1
        if self._n_rejected[rejected.reason] <= MAX_EXAMPLES:
            self.examples.append(Example.of(position, rejected, text))
        if rejected.is_bad and len(self.bad) < _MAX_BAD:
            self.bad.append((position, one_line(rejected.detail)))

    def table(self) -> pa.Table:
        return pa.Table.from_batches(self._batches, _TEXT).combine_chunks()


def _clean(texts: list[str | Rejected], log: _TextLog, source: Source, params: CollectParams) -> pa.RecordBatch:
    """Clean a batch; log its texts, and return the candidates."""
    cleaned = clean(texts, params, keep_trailing_spaces=source.keep_trailing_spaces)
    rejected: dict[int, Rejected] = {}
    if contains_rejected(cleaned):
        rejected = {i: text for i, text in enumerate(cleaned) if isinstance(text, Rejected)}
    contents = [text.encode() for text in cleaned if isinstance(text, str)]
    digests = b"".join([hashlib.sha256(content).digest() for content in contents])
    if source.weight < 1:
        positions = np.delete(np.arange(len(cleaned)), list(rejected))
        is_chosen = np.frombuffer(digests, ">u4")[7::8] < source.weight * 2**32  # the last 4 bytes of each id
        rejected |= dict.fromkeys(positions[~is_chosen].tolist(), Rejected("weighted_out"))
        rejected = dict(sorted(rejected.items()))
        contents = [content for content, is_kept in zip(contents, is_chosen, strict=True) if is_kept]
        digests = np.frombuffer(digests, np.uint8).reshape(-1, 32)[is_chosen].tobytes()
    n_bytes = list(map(len, contents))
    log.add(texts, rejected, digests, n_bytes)
    ids = pa.Array.from_buffers(pa.binary(32), len(contents), [None, pa.py_buffer(digests)])
    columns = [ids, pa.array(contents, pa.string()), pa.array(n_bytes, pa.int64())]
    return pa.RecordBatch.from_arrays(columns, schema=_CANDIDATE)

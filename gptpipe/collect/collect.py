"""Stage collect as one function: sources in, clean and distinct documents out, everything left out counted."""

import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gptpipe.base.manifest import new_folder
from gptpipe.base.parallel import map_in_order
from gptpipe.base.parquet import read_parquet, strings
from gptpipe.base.resume import finish, finished, key_of
from gptpipe.collect.batch import Batch, Rejected, rows_of_shards
from gptpipe.collect.cleaning import clean
from gptpipe.collect.dedup import Seen, near_duplicates
from gptpipe.collect.filters import are_on
from gptpipe.collect.params import CollectParams, Source
from gptpipe.collect.readers import fingerprint, read
from gptpipe.collect.tables import is_remote
from gptpipe.collect.tally import Tally
from gptpipe.formats.corpus import SCHEMA, id_of, shard_path, shard_paths, sizes, write_shard
from gptpipe.shell.console import Progress
from gptpipe.shell.environment import optional_module
from gptpipe.shell.errors import GptpipeError, InputError

_TEXTS, _CHARACTERS = 1 << 13, 1 << 18  # at most, and about, that are cleaned together
_ALONE = 16  # batches of a source that this process cleans by itself: to start another costs about as much


def collect(params: CollectParams, target: Path, report: Path | None = None) -> dict[str, int]:
    """Write the corpus to `target` and return its counts: documents in = kept + rejected, by reason; also to `report`.

    After a kill, shards that were finished are not made again: the sources are read up to where the last one ended, and
    cleaned from there. A remote source may have changed, so with one all starts anew, as the search for near-duplicates
    always does. Raises InputError where a source cannot be read or nothing is left.
    """
    if near := params.dedup == "near":
        optional_module("rensa", "near")  # said now, not after the first pass
    kinds = [source.kind for source in params.sources]
    tally = Tally(kind if kinds.count(kind) == 1 else f"{kind}-{i}" for i, kind in enumerate(kinds))
    made_from = fingerprint(params.sources)
    libraries = ["pyarrow", *(["datasets"] if "huggingface" in kinds else [])]
    is_local = not any(map(_is_remote, params.sources))
    key = key_of("collect", [made_from, params.model_dump()], *libraries) if is_local else ""
    with new_folder(target, made_from, key) as folder, Progress("collect", unit="documents") as progress:
        exact = folder.path / "exact" if near else folder.path
        _write_shards(exact, params, tally, made_from, progress)
        if near:
            repeats = near_duplicates(shard_paths(exact), params.near_similarity, exact / "signatures")
            batches = _without(shard_paths(exact), repeats, tally)
            for number, (rows, _) in enumerate(rows_of_shards(batches)):
                write_shard(shard_path(folder.path, number), rows)
            shutil.rmtree(exact)
        if report:
            tally.write(report)
        folder.counts = dict(tally)
        if not tally["documents"]:
            raise InputError(f"collect: no document left of {tally['documents_in']} ({_in_words(tally)}); add text")
    return dict(tally)


def _is_remote(source: Source) -> bool:
    return any(map(is_remote, getattr(source, "paths", ())))


def _write_shards(
    folder: Path, params: CollectParams, tally: Tally, digests: dict[str, str], progress: Progress
) -> None:
    """Write the shards that a kill did not leave finished."""
    first, seen, is_last = 0, Seen(), False
    while done := finished([path := shard_path(folder, first)]):
        tally.restore(done["result"])
        for batch in read_parquet(path, ["id"]):
            seen.add(strings(batch, "id"))
            progress.advance(len(batch))
        first, is_last = first + 1, done["result"]["is_last"]
    rest = rows_of_shards(_batches(params, tally, digests, seen), partial(_count, tally=tally, params=params))
    with ThreadPoolExecutor(1) as writer:  # it compresses one shard while this thread cleans the next
        last: Future[int] | None = None
        for number, (rows, ends) in enumerate(() if is_last else rest, first):
            note = {**tally.note(), "is_last": ends}
            before, last = last, writer.submit(_write_shard, shard_path(folder, number), rows, note)
            progress.advance(before.result() if before else 0)
        progress.advance(last.result() if last else 0)


def _write_shard(path: Path, rows: pa.Table, note: dict[str, Any]) -> int:
    write_shard(path, rows)
    finish([path], note)
    return len(rows)


def _batches(params: CollectParams, tally: Tally, digests: dict[str, str], seen: Seen) -> Iterator[Batch]:
    """What the sources hold behind what is in the tally, equal texts and what is above a limit removed."""
    for name, source in zip(tally.by_source, params.sources, strict=True):
        n_documents, n_bytes = (tally.by_source[name][what] for what in ("documents", "bytes"))
        if n_documents >= (source.max_documents or inf) or n_bytes >= (source.max_bytes or inf):
            continue
        for batch in _cleaned(name, source, params, digests, tally.documents_in(name)):
            if params.dedup != "none":
                batch = batch.without(seen.add(strings(batch.rows, "id")), Rejected("duplicate"))
            ends = n_bytes + sizes(batch.rows).cumsum()
            to_max_bytes = int(np.searchsorted(ends, source.max_bytes or inf)) + 1
            n_left = min((source.max_documents or inf) - n_documents, to_max_bytes)
            if len(ends) >= n_left:
                batch, rest = batch.split(int(n_left))
                seen.forget(strings(rest.rows, "id"))
            yield batch
            if len(ends) >= n_left:
                break
            n_documents, n_bytes = n_documents + len(ends), n_bytes + int(sizes(batch.rows).sum())


def _cleaned(name: str, source: Source, params: CollectParams, digests: dict[str, str], start: int) -> Iterator[Batch]:
    """A source's documents from text `start`, equal ones not yet removed; of many other processes clean some."""
    n_texts = min(_TEXTS, source.max_documents or _TEXTS)
    alone = _ALONE if are_on(params.filters) else sys.maxsize  # without filters, handing texts over costs what it saves
    if (source.max_documents or source.max_bytes) and _is_remote(source):
        n_texts, alone = 1, sys.maxsize  # its digest is of what was read, so nothing is read ahead
    waiting = deque[_Raw]()

    def read_ahead() -> Iterator[list[str | Rejected]]:
        for raw in _raw(source, start, n_texts, params, digests):
            waiting.append(raw)
            yield raw.texts

    work, texts = partial(_clean, name=name, weight=source.weight, params=params), read_ahead()
    for batch in chain(map(work, islice(texts, alone)), map_in_order(work, texts)):
        these, cut, error = waiting.popleft()
        if error:
            raise error
        yield batch._replace(texts=these, cut=cut)


class _Raw(NamedTuple):
    texts: list[str | Rejected]
    cut: int  # of the source so far
    error: GptpipeError | None = None  # where no more can be read


def _raw(source: Source, start: int, n_texts: int, params: CollectParams, digests: dict[str, str]) -> Iterator[_Raw]:
    """A source's texts from text `start`, some together. An error waits its turn: a limit may come before it."""
    counts = Counter[str]()
    texts: list[str | Rejected] = []
    cut = size = 0
    try:
        for more in read(source, params, counts, digests):
            if start:  # is behind it, or within
                start, more = max(0, start - len(more)), more[start:]
            if counts["cut"] != cut:
                if texts:
                    yield _Raw(texts, cut)
                texts, cut, size = [], counts["cut"], 0
            texts += more
            size += sum([len(text) for text in more if isinstance(text, str)])
            if len(texts) >= n_texts or size >= _CHARACTERS:
                for first in range(0, len(texts), _TEXTS):  # one list may hold many more, blank lines for example
                    yield _Raw(texts[first : first + _TEXTS], cut)
                texts, size = [], 0
    except GptpipeError as error:
        yield _Raw(texts, cut)
        yield _Raw([], cut, error)
        return
    yield _Raw(texts, counts["cut"])


def _clean(texts: list[str | Rejected], *, name: str, weight: float, params: CollectParams) -> Batch:
    """Runs in a worker process too; the texts themselves do not come back from there."""
    found = clean(texts, params)
    rejected = {i: text for i, text in enumerate(found) if isinstance(text, Rejected)}
    contents = [text.encode() for text in found if isinstance(text, str)]
    ids = [id_of(content) for content in contents]
    columns = [pa.array(ids, pa.string()), pa.repeat(name, len(ids)), pa.array(contents, pa.string()),
               pa.array(map(len, contents), pa.int64())]  # fmt: skip
    positions = np.delete(np.arange(len(found)), list(rejected))
    batch = Batch(name, 0, [], pa.RecordBatch.from_arrays(columns, schema=SCHEMA), positions, rejected)
    if weight == 1:
        return batch
    drawn = np.array([int(id_[-8:], 16) for id_ in ids])
    return batch.without(drawn >= weight * 2**32, Rejected("weighted_out"))


def _count(batch: Batch, *, tally: Tally, params: CollectParams) -> None:
    tally["documents_in"] += len(batch.texts)
    tally.add(batch.source, "documents", len(batch.rows))
    tally.add(batch.source, "bytes", int(sizes(batch.rows).sum()))
    tally.add(batch.source, "cut", batch.cut - tally.by_source[batch.source]["cut"])
    for i, rejected in sorted(batch.rejected.items()):
        tally.reject(batch.source, rejected, batch.texts[i])
    if params.encoding_errors == "replace" and (n := pc.match_substring(batch.rows["text"], "\ufffd").true_count):
        tally["with_replacement_character"] += n


def _without(shards: list[Path], repeats: npt.NDArray[np.bool_], tally: Tally) -> Iterator[Batch]:
    """The documents of the shards without those that repeat others, which the tally takes back."""
    start = 0
    for rows in chain.from_iterable(read_parquet(shard, SCHEMA.names) for shard in shards):
        gone = repeats[start : start + len(rows)]
        for row in rows.filter(pa.array(gone)).to_pylist():
            tally.add(row["source"], "documents", -1)
            tally.add(row["source"], "bytes", -row["n_bytes"])
            tally.reject(row["source"], Rejected("near_duplicate"), row["text"])
        yield Batch("", 0, [], rows.filter(pa.array(~gone)), np.arange(len(gone) - gone.sum()), {})
        start += len(rows)


def _in_words(counts: Counter[str]) -> str:
    reasons = {name.removeprefix("rejected_"): n for name, n in sorted(counts.items()) if name.startswith("rejected_")}
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "the sources are empty"

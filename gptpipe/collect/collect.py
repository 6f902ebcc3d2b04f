"""Stage collect: reads the sources, writes clean and distinct documents, counts every rejected text."""

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

_MAX_TEXTS = 1 << 13  # in a batch
_BATCH_CHARACTERS = 1 << 18  # about; a batch is cleaned together
_LOCAL_BATCHES = 16  # of a source, cleaned in this process; starting worker processes pays off only for more


def collect(params: CollectParams, target: Path, report: Path | None = None) -> dict[str, int]:
    """Write the corpus to `target` and the page about rejected texts to `report`; return the counts.

    Each text that is read is either kept, or counted under the reason of its rejection. After a kill, finished
    shards are kept: the sources are read again, but cleaned only from where the last finished shard ended. A run with
    a remote source starts from the beginning, because the source may have changed. The search for near-duplicates
    always does. Raises InputError if a source cannot be read, or no document is left.
    """
    near = params.dedup == "near"
    if near:
        optional_module("rensa", "near")  # fail early if it is not installed
    kinds = [source.kind for source in params.sources]
    tally = Tally(kind if kinds.count(kind) == 1 else f"{kind}-{i}" for i, kind in enumerate(kinds))
    made_from = fingerprint(params.sources)
    libraries = ["pyarrow", *(["datasets"] if "huggingface" in kinds else [])]
    is_resumable = not any(map(_is_remote, params.sources))
    key = key_of("collect", [made_from, params.model_dump()], *libraries) if is_resumable else ""
    with new_folder(target, made_from, key) as folder, Progress("collect", unit="documents") as progress:
        exact_folder = folder.path / "exact" if near else folder.path
        _write_shards(exact_folder, params, tally, made_from, progress)
        if near:
            is_duplicate = near_duplicates(
                shard_paths(exact_folder), params.near_similarity, exact_folder / "signatures"
            )
            batches = _without_duplicates(shard_paths(exact_folder), is_duplicate, tally)
            for number, (rows, _) in enumerate(rows_of_shards(batches)):
                write_shard(shard_path(folder.path, number), rows)
            shutil.rmtree(exact_folder)
        if report:
            tally.write(report)
        folder.counts = dict(tally)
        if not tally["documents"]:
            reasons = _rejections(tally) or "the sources are empty"
            raise InputError(f"collect: no document left of {tally['documents_in']} ({reasons}); add text")
    return dict(tally)


def _is_remote(source: Source) -> bool:
    return any(map(is_remote, getattr(source, "paths", ())))


def _write_shards(
    folder: Path, params: CollectParams, tally: Tally, digests: dict[str, str], progress: Progress
) -> None:
    """Restore the counts from the finished shards of a killed run, and write the remaining shards."""
    seen = Seen()
    first = 0
    is_complete = False
    while done := finished([path := shard_path(folder, first)]):
        tally.restore(done["result"])
        for batch in read_parquet(path, ["id"]):
            seen.add(strings(batch, "id"))
            progress.advance(len(batch))
        first += 1
        is_complete = done["result"]["is_last"]
    if is_complete:
        return
    shards = rows_of_shards(_batches(params, tally, digests, seen), partial(_count, tally=tally, params=params))
    with ThreadPoolExecutor(1) as writer:  # it compresses one shard while this thread cleans the next
        pending: Future[int] | None = None
        for number, (rows, is_last) in enumerate(shards, first):
            result = {**tally.to_json(), "is_last": is_last}
            previous, pending = pending, writer.submit(_write_shard, shard_path(folder, number), rows, result)
            progress.advance(previous.result() if previous else 0)
        progress.advance(pending.result() if pending else 0)


def _write_shard(path: Path, rows: pa.Table, result: dict[str, Any]) -> int:
    write_shard(path, rows)
    finish([path], result)
    return len(rows)


def _batches(params: CollectParams, tally: Tally, digests: dict[str, str], seen: Seen) -> Iterator[Batch]:
    """The remaining batches of the sources: after the texts already counted, without duplicates, up to the limits."""
    for name, source in zip(tally.by_source, params.sources, strict=True):
        n_documents = tally.by_source[name]["documents"]
        n_bytes = tally.by_source[name]["bytes"]
        if n_documents >= (source.max_documents or inf) or n_bytes >= (source.max_bytes or inf):
            continue
        for batch in _cleaned(name, source, params, digests, tally.documents_in(name)):
            if params.dedup != "none":
                batch = batch.without(seen.add(strings(batch.rows, "id")), Rejected("duplicate"))
            ends = n_bytes + sizes(batch.rows).cumsum()
            n_to_max_bytes = int(np.searchsorted(ends, source.max_bytes or inf)) + 1
            n_left = min((source.max_documents or inf) - n_documents, n_to_max_bytes)
            if len(ends) >= n_left:
                batch, rest = batch.split(int(n_left))
                seen.forget(strings(rest.rows, "id"))
            yield batch
            if len(ends) >= n_left:
                break
            n_documents += len(ends)
            n_bytes += int(sizes(batch.rows).sum())


def _cleaned(name: str, source: Source, params: CollectParams, digests: dict[str, str], start: int) -> Iterator[Batch]:
    """A source's documents from text `start`, duplicates included. Worker processes clean the later batches."""
    max_texts = min(_MAX_TEXTS, source.max_documents or _MAX_TEXTS)
    n_local = _LOCAL_BATCHES if are_on(params.filters) else sys.maxsize  # else sending costs more than it saves
    if (source.max_documents or source.max_bytes) and _is_remote(source):
        # Do not read ahead: the digest of a remote source covers exactly the bytes that were read.
        max_texts, n_local = 1, sys.maxsize
    waiting = deque[_RawBatch]()

    def read_ahead() -> Iterator[list[str | Rejected]]:
        for raw in _raw_batches(source, start, max_texts, params, digests):
            waiting.append(raw)
            yield raw.texts

    work = partial(_clean, name=name, weight=source.weight, params=params)
    texts = read_ahead()
    for batch in chain(map(work, islice(texts, n_local)), map_in_order(work, texts)):
        raw = waiting.popleft()
        if raw.error:
            raise raw.error
        yield batch._replace(texts=raw.texts, cut=raw.cut)


class _RawBatch(NamedTuple):
    texts: list[str | Rejected]
    cut: int  # number of cuts in long texts of the source so far
    error: GptpipeError | None = None  # why the source cannot be read further


def _raw_batches(
    source: Source, start: int, max_texts: int, params: CollectParams, digests: dict[str, str]
) -> Iterator[_RawBatch]:
    """A source's texts from text `start`, in batches.

    An error is the last batch, because a limit of the source may stop the reading before it.
    """
    counts = Counter[str]()
    texts: list[str | Rejected] = []
    cut = n_characters = 0
    try:
        for next_texts in read(source, params, counts, digests):
            if start:  # skip what comes before text `start`
                start, next_texts = max(0, start - len(next_texts)), next_texts[start:]
            if counts["cut"] != cut:
                if texts:
                    yield _RawBatch(texts, cut)
                texts, cut, n_characters = [], counts["cut"], 0
            texts += next_texts
            n_characters += sum([len(text) for text in next_texts if isinstance(text, str)])
            if len(texts) >= max_texts or n_characters >= _BATCH_CHARACTERS:
                for first in range(0, len(texts), _MAX_TEXTS):  # `next_texts` may be many, such as blank lines
                    yield _RawBatch(texts[first : first + _MAX_TEXTS], cut)
                texts, n_characters = [], 0
    except GptpipeError as error:
        yield _RawBatch(texts, cut)
        yield _RawBatch([], cut, error)
        return
    yield _RawBatch(texts, counts["cut"])


def _clean(texts: list[str | Rejected], *, name: str, weight: float, params: CollectParams) -> Batch:
    """Clean a batch, maybe in a worker process. The raw texts are not part of the result: the caller has them."""
    cleaned = clean(texts, params)
    rejected = {i: text for i, text in enumerate(cleaned) if isinstance(text, Rejected)}
    contents = [text.encode() for text in cleaned if isinstance(text, str)]
    ids = [id_of(content) for content in contents]
    columns = [
        pa.array(ids, pa.string()),
        pa.repeat(name, len(ids)),
        pa.array(contents, pa.string()),
        pa.array(map(len, contents), pa.int64()),
    ]
    rows = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
    positions = np.delete(np.arange(len(cleaned)), list(rejected))
    batch = Batch(name, cut=0, texts=[], rows=rows, positions=positions, rejected=rejected)
    if weight == 1:
        return batch
    ranks = np.array([int(id_[-8:], 16) for id_ in ids])  # uniform in 0 .. 2**32 - 1
    return batch.without(ranks >= weight * 2**32, Rejected("weighted_out"))


def _count(batch: Batch, *, tally: Tally, params: CollectParams) -> None:
    tally["documents_in"] += len(batch.texts)
    tally.add(batch.source, "documents", len(batch.rows))
    tally.add(batch.source, "bytes", int(sizes(batch.rows).sum()))
    tally.add(batch.source, "cut", batch.cut - tally.by_source[batch.source]["cut"])
    for i, rejected in sorted(batch.rejected.items()):
        tally.reject(batch.source, rejected, batch.texts[i])
    if params.encoding_errors == "replace":
        n_replaced = pc.match_substring(batch.rows["text"], "\ufffd").true_count
        if n_replaced:
            tally["with_replacement_character"] += n_replaced


def _without_duplicates(shards: list[Path], is_duplicate: npt.NDArray[np.bool_], tally: Tally) -> Iterator[Batch]:
    """The documents of the shards without the near-duplicates, which the tally now counts as rejected."""
    start = 0
    for rows in chain.from_iterable(read_parquet(shard, SCHEMA.names) for shard in shards):
        is_removed = is_duplicate[start : start + len(rows)]
        for row in rows.filter(pa.array(is_removed)).to_pylist():
            tally.add(row["source"], "documents", -1)
            tally.add(row["source"], "bytes", -row["n_bytes"])
            tally.reject(row["source"], Rejected("near_duplicate"), row["text"])
        kept = rows.filter(pa.array(~is_removed))
        yield Batch("", cut=0, texts=[], rows=kept, positions=np.arange(len(kept)), rejected={})
        start += len(rows)


def _rejections(counts: Counter[str]) -> str:
    """Number and reason of all rejections."""
    rejected = sorted((name, n) for name, n in counts.items() if name.startswith("rejected_"))
    return ", ".join(f"{n} {name.removeprefix('rejected_')}" for name, n in rejected)

"""Contamination: documents that share a run of `split.ngram` words between train and the held-out texts.

The held-out texts are val, test, the benchmarks of `split.benchmarks` and the tasks of `evaluate.tasks`. The
measure is that of GPT-3 (Brown et al., 2020, arXiv:2005.14165, appendix C), in words, so it does not depend on
the tokenizer:

- A held-out document is contaminated if one of its n-grams occurs in a train document. One of fewer than n
  words is contaminated if all of it occurs in a train document, as a run of words.
- A train document is contaminated if it contains such an n-gram or short document.
- A document of fewer than `MIN_WORDS` words is counted, but not examined.

The corpus is read three times, the benchmarks (gptpipe/split/benchmarks.py) twice. Only 64-bit hashes of
n-grams and of short documents, together called runs, are kept in memory:

1. `_held_out_runs` collects the distinct runs of the held-out documents.
2. `_search` in train finds which of them occur there, and the train documents that contain one.
3. `_search` in the held-out documents finds those that have a run that occurs in train.

Step 1 keeps at most `_MAX_RUNS`. If there are more, it keeps those of one in 2, 4, 8, ... held-out documents,
and step 3 examines the same documents. The shares of the held-out groups are then estimates; the share of train
is a lower bound. Whole documents are sampled, because a contaminated document may share a single n-gram, which
a sample of n-grams would miss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gptpipe.base.files import write_json
from gptpipe.base.parallel import Map, map_in_order
from gptpipe.base.parquet import read_parquet, strings
from gptpipe.collect.params import CollectParams
from gptpipe.collect.words import Hashes, Indices
from gptpipe.formats.corpus import shard_paths, verify_corpus
from gptpipe.formats.sides import SIDES, sides_of
from gptpipe.shell.errors import InputError
from gptpipe.split.benchmarks import Benchmark, Tasks, collected
from gptpipe.split.ngrams import MIN_WORDS, Lookup, Runs
from gptpipe.split.params import SplitParams

_MAX_RUNS = 1 << 20  # of held-out documents in memory, 24 bytes each
_BLOCK_CHARACTERS = 1 << 18  # that a thread hashes at once, with 60 bytes of memory for each character
_SMALL_BYTES = 1 << 26  # of text: below, threads are used, because starting worker processes takes longer
_MAX_IDS = 20  # contaminated documents of val and of test in the report, and of any group in an error
_RANK_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so different sums stay different


class _Block(NamedTuple):
    """Texts that are hashed together, about _BLOCK_CHARACTERS unless one text alone is longer."""

    groups: Indices  # for each text: the index of its group in the report
    ids: list[str]
    texts: list[str]


# Reads the blocks of one shard or benchmark part when called, in a thread or on another machine.
ReadBlocks = Callable[[], Iterator[_Block]]


@dataclass
class _Matches:
    """What a search finds in some documents."""

    occurs: npt.NDArray[np.bool_]  # for each run that is searched for: whether a document contains it
    counts: Indices  # (groups, 3): documents, examined documents, contaminated documents
    ids: dict[int, list[str]]  # contaminated documents of each group; of val and test, the first

    @classmethod
    def empty(cls, n_runs: int, n_groups: int) -> "_Matches":
        return cls(np.zeros(n_runs, np.bool_), np.zeros((n_groups, 3), np.int64), {})

    def add(self, other: "_Matches") -> None:
        self.occurs |= other.occurs
        self.counts += other.counts
        for group, ids in other.ids.items():
            most = _MAX_IDS if group < len(SIDES) else None
            self.ids[group] = [*self.ids.get(group, []), *ids][:most]


def report_contamination(
    raw: Path, path: Path, params: SplitParams, collect: CollectParams, seed: int, tasks: Tasks
) -> list[str]:
    """Write to `path` how many documents of each group are contaminated; `raw` is the corpus.

    Returns a line for each benchmark and task of which an item is contaminated, or is not examined.
    Raises InputError if a held-out group has a larger share than `split.max_contamination` or, with this limit,
    an unknown share; and if a benchmark has no text.
    """
    is_small = verify_corpus(raw).counts["bytes"] < _SMALL_BYTES
    shards = shard_paths(raw)
    with collected(params.benchmarks, tasks, collect, raw) as benchmarks:
        groups = [*SIDES, *(benchmark.group for benchmark in benchmarks)]

        def train() -> Iterator[ReadBlocks]:
            return (partial(_shard_blocks, shard, params, seed, is_train=True) for shard in shards)

        def held_out() -> Iterator[ReadBlocks]:
            yield from (partial(_shard_blocks, shard, params, seed, is_train=False) for shard in shards)
            for group, benchmark in enumerate(benchmarks, start=len(SIDES)):
                yield from _work_on_benchmark(benchmark, group)

        run: Map = partial(map_in_order, threads=is_small, small=is_small)
        runs = _held_out_runs(held_out(), params.ngram, run)
        in_train = _search(train(), runs, params.ngram, len(groups), run, contained=True)
        in_held_out = _search(held_out(), runs.only(in_train.occurs), params.ngram, len(groups), run)

    report = _report(groups, in_train.counts + in_held_out.counts)
    named = {benchmark.group: benchmark for benchmark in benchmarks}
    report |= {f"{group}_rejected": benchmark.n_rejected for group, benchmark in named.items()}
    report["ids"] = {groups[group]: ids for group, ids in in_held_out.ids.items()}
    report["unlisted"] = {
        group: report[f"{group}_contaminated"] - len(ids) for group, ids in report["ids"].items()
    }
    report["every_nth"] = runs.every_nth
    if named:
        report["benchmarks"] = {group: benchmark.description for group, benchmark in named.items()}
    write_json(path, report)
    _check_shares(report, params)
    return _overlapping(report, named) + _not_examined(report, named, min(MIN_WORDS, params.ngram))


def _overlapping(report: dict[str, Any], named: dict[str, Benchmark]) -> list[str]:
    return [
        f"{report[f'{group}_contaminated']} of {report[f'{group}_examined']} examined items of "
        f"{benchmark.description} overlap with train: {', '.join(report['ids'][group])}"
        for group, benchmark in named.items()
        if group in report["ids"]
    ]


def _not_examined(report: dict[str, Any], named: dict[str, Benchmark], min_words: int) -> list[str]:
    """A line for each benchmark with items that are too short, or have no text at the key.

    In a sample, it is unknown how many are too short.
    """
    lines = []
    for group, benchmark in named.items():
        n_documents, n_without_text = report[f"{group}_documents"], benchmark.n_rejected
        n_short = n_documents - report[f"{group}_examined"] if report["every_nth"] == 1 else 0
        n, n_items = n_short + n_without_text, n_documents + n_without_text
        if n:
            reasons = f"{n_short} have fewer than {min_words} words, {n_without_text} have no text"
            lines.append(f"{n} of {n_items} items of {benchmark.description} are not examined: {reasons}")
    return lines


def _report(groups: list[str], counts: Indices) -> dict[str, Any]:
    """Counts of each group that has documents, and the contaminated share of its examined documents.

    The share is None if no document was examined.
    """
    report: dict[str, Any] = {}
    shares: dict[str, float | None] = {}
    for group, (n_documents, n_examined, n_contaminated) in zip(groups, counts.tolist(), strict=True):
        if n_documents:
            report[f"{group}_documents"] = n_documents
            report[f"{group}_examined"] = n_examined
            report[f"{group}_contaminated"] = n_contaminated
            shares[group] = n_contaminated / n_examined if n_examined else None
    return {**report, "share": shares}


def _check_shares(report: dict[str, Any], params: SplitParams) -> None:
    if params.max_contamination is None:
        return
    for group, share in report["share"].items():
        if group == "train" or (share is not None and share <= params.max_contamination):
            continue
        name = f"{group} ({report['benchmarks'][group]})" if group.startswith("benchmark-") else group
        if share is None:
            raise InputError(
                f"split: none of the {report[f'{group}_documents']} documents of {name} has "
                f"{min(MIN_WORDS, params.ngram)} words or more, so their overlap with train is unknown; make "
                "them longer, for example a question with its answer, or set split.max_contamination to null"
            )
        ids = report["ids"][group][:_MAX_IDS]
        n_unlisted = report[f"{group}_contaminated"] - len(ids)
        counts = f"{report[f'{group}_contaminated']} of {report[f'{group}_examined']} examined documents"
        more = f", and {n_unlisted} more" if n_unlisted else ""
        raise InputError(
            f"split: {counts} of {name} ({share:.2%}) share {params.ngram} words in a row with train, or occur "
            f"there as a whole, above split.max_contamination; remove them, or raise the limit: "
            f"{', '.join(ids)}{more}"
        )


def _shard_blocks(shard: Path, params: SplitParams, seed: int, *, is_train: bool) -> Iterator[_Block]:
    """The train documents of a shard of the corpus, or its val and test documents."""
    for batch in read_parquet(shard, ["id", "text"]):
        sides = sides_of(strings(batch, "id"), params.fractions, seed)
        is_chosen = (sides == SIDES.index("train")) == is_train
        documents = batch.filter(pa.array(is_chosen))
        yield from _cut_into_blocks(sides[is_chosen], strings(documents, "id"), strings(documents, "text"))


def _benchmark_blocks(shard: Path, numbers: Indices, group: int) -> Iterator[_Block]:
    """The texts of a shard of a benchmark. Ids are the numbers of the items in their source."""
    for batch in read_parquet(shard, ["text"]):
        ids = [f"item {number}" for number in numbers[: len(batch)]]
        numbers = numbers[len(batch) :]
        yield from _cut_into_blocks(np.full(len(ids), group), ids, strings(batch, "text"))


def _work_on_benchmark(benchmark: Benchmark, group: int) -> Iterator[ReadBlocks]:
    start = 0
    for shard in benchmark.shards:
        end = start + pq.read_metadata(shard).num_rows
        yield partial(_benchmark_blocks, shard, benchmark.numbers[start:end], group)
        start = end


def _cut_into_blocks(groups: Indices, ids: list[str], texts: list[str]) -> Iterator[_Block]:
    """Group consecutive texts into blocks. A text is never split."""
    block_of_text = np.cumsum([len(text) for text in texts]) // _BLOCK_CHARACTERS
    first_of_block = np.flatnonzero(np.diff(block_of_text)) + 1
    for start, end in pairwise([0, *first_of_block, len(texts)]):
        yield _Block(groups[start:end], ids[start:end], texts[start:end])


@dataclass
class _HeldOutRuns:
    """Distinct runs of the held-out documents, or of one in `every_nth`."""

    hashes: Hashes
    prefixes: Hashes  # of short documents; 0 for n-grams
    every_nth: int

    def only(self, is_kept: npt.NDArray[np.bool_]) -> "_HeldOutRuns":
        return _HeldOutRuns(self.hashes[is_kept], self.prefixes[is_kept], self.every_nth)


def _held_out_runs(work: Iterator[ReadBlocks], n: int, run: Map) -> _HeldOutRuns:
    """Workers sample with the latest `every_nth` when they start, so what arrives here does not grow."""
    samples = [np.empty((3, 0), np.uint64)]
    every_nth = 1
    sampled_work = ((read_blocks, every_nth) for read_blocks in work)
    for ranked in run(partial(_ranked_runs, n=n), sampled_work):
        samples.append(ranked[:, _is_sampled(ranked[0], every_nth)])
        if sum(sample.shape[1] for sample in samples) > 3 * _MAX_RUNS // 2:  # sorting takes longer than hashing
            sample, every_nth = _shrink(np.concatenate(samples, axis=1), every_nth)
            samples = [sample]
    sample, every_nth = _shrink(np.concatenate(samples, axis=1), every_nth)
    return _HeldOutRuns(sample[1], sample[2], every_nth)


def _ranked_runs(work: tuple[ReadBlocks, int], *, n: int) -> Hashes:
    """Rank of the document, hash, and prefix (3, runs) of each distinct run of every n-th document."""
    read_blocks, every_nth = work
    ranked = [np.empty((3, 0), np.uint64)]
    for block in read_blocks():
        runs = Runs(block.texts, n)
        of_block = np.stack([_document_ranks(runs), runs.hashes, runs.prefixes])
        ranked.append(of_block[:, _is_sampled(of_block[0], every_nth)])
    return _distinct(np.concatenate(ranked, axis=1))


def _document_ranks(runs: Runs) -> Hashes:
    """For each run the pseudo-random rank of its document, derived from all runs of the document."""
    starts = np.flatnonzero(np.diff(runs.texts, prepend=-1))
    if not len(starts):
        return np.empty(0, np.uint64)
    ranks = np.add.reduceat(runs.hashes, starts) * _RANK_FACTOR
    return np.repeat(ranks, np.diff(starts, append=len(runs.texts)))


def _is_sampled(ranks: Hashes, every_nth: int) -> npt.NDArray[np.bool_]:
    return np.asarray(ranks <= np.uint64((2**64 - 1) // every_nth))


def _shrink(sample: Hashes, every_nth: int) -> tuple[Hashes, int]:
    """Keep the distinct runs; while there are more than _MAX_RUNS, sample half as many documents."""
    sample = _distinct(sample)
    while sample.shape[1] > _MAX_RUNS:
        every_nth *= 2
        sample = sample[:, _is_sampled(sample[0], every_nth)]
    return sample, every_nth


def _distinct(ranked: Hashes) -> Hashes:
    """Each distinct run with the lowest rank of the documents that contain it."""
    by_rank = ranked[:, np.argsort(ranked[0])]
    _, first = np.unique(by_rank[1], return_index=True)
    return by_rank[:, first]


def _search(
    work: Iterator[ReadBlocks], runs: _HeldOutRuns, n: int, n_groups: int, run: Map, *, contained: bool = False
) -> _Matches:
    """Search all documents for the runs.

    `contained`: the documents are those of train, which may contain a short document. Otherwise they are the
    held-out ones, and if the runs are a sample, only the documents that were sampled are searched.
    """
    matches = _Matches.empty(len(runs.hashes), n_groups)
    prefixes = Lookup(np.unique(runs.prefixes[runs.prefixes > 0])) if contained else None
    every_nth = 1 if contained else runs.every_nth
    search = partial(
        _search_blocks, runs=Lookup(runs.hashes), prefixes=prefixes, every_nth=every_nth, n=n, n_groups=n_groups
    )
    for part in run(search, work):
        matches.add(part)
    return matches


def _search_blocks(
    read_blocks: ReadBlocks, *, runs: Lookup, prefixes: Lookup | None, every_nth: int, n: int, n_groups: int
) -> _Matches:
    matches = _Matches.empty(runs.size, n_groups)
    for block in read_blocks():
        of_block = Runs(block.texts, n)
        hashes, texts, examined = of_block.hashes, of_block.texts, of_block.examined
        if every_nth > 1:
            is_sampled = _is_sampled(_document_ranks(of_block), every_nth)
            hashes, texts = hashes[is_sampled], texts[is_sampled]
            examined = np.unique(texts)
        positions, found = runs.find(hashes)
        contaminated = np.unique(texts[positions])
        if prefixes and prefixes.size:
            found_short, with_short = of_block.find_short(runs, prefixes)
            found = np.concatenate([found, found_short])
            contaminated = np.union1d(contaminated, with_short)

        occurs = np.zeros(runs.size, np.bool_)
        occurs[found] = True
        texts_of_columns = (block.groups, block.groups[examined], block.groups[contaminated])
        counts = np.stack([np.bincount(groups, minlength=n_groups) for groups in texts_of_columns], axis=1)
        ids: dict[int, list[str]] = {}
        for i in contaminated:
            ids.setdefault(int(block.groups[i]), []).append(block.ids[i])
        matches.add(_Matches(occurs, counts, ids))
    return matches

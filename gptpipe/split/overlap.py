"""Contamination: documents that share a run of `split.ngram` words between train and the held-out texts.

The held-out texts are val, test and the benchmarks of `split.benchmarks`. The measure is that of GPT-3 (Brown et al.,
2020, arXiv:2005.14165, appendix C), in words, so it does not depend on the tokenizer:

- A held-out document is contaminated if one of its n-grams occurs in a train document.
- A train document is contaminated if one of its n-grams occurs in a held-out document.
- A document of fewer than n words has no n-gram. It is counted, but not examined.

The corpus is read three times, the benchmarks twice. Only 64-bit hashes of n-grams are kept in memory:

1. `_held_out_ngrams` collects the distinct n-grams of the held-out documents.
2. `_search` in train finds which of them occur there, and the train documents that contain one.
3. `_search` in the held-out documents finds those that contain an n-gram that occurs in train.

Step 1 keeps at most `_MAX_NGRAMS`. If there are more, it keeps those of one in 2, 4, 8, ... held-out documents,
and step 3 examines the same documents. The shares of the held-out groups are then estimates; the share of train is a
lower bound. Whole documents are sampled, because a contaminated document may share a single n-gram, which a sample of
n-grams would miss.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from gptpipe.base.files import write_json
from gptpipe.base.parallel import map_in_order
from gptpipe.base.parquet import read_parquet, strings
from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import read_source
from gptpipe.collect.texts import Rejected
from gptpipe.formats.corpus import shard_paths, verify_corpus
from gptpipe.formats.sides import SIDES, sides_of
from gptpipe.shell.errors import InputError
from gptpipe.split.ngrams import Hashes, Indices, hash_ngrams
from gptpipe.split.params import SplitParams

_MAX_NGRAMS = 1 << 20  # of held-out documents in memory, 16 bytes each
_BLOCK_CHARACTERS = 1 << 18  # that a thread hashes at once, with 60 bytes of memory for each character
_MAX_IDS = 20  # contaminated documents listed in the report, for each held-out group
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

    occurs: npt.NDArray[np.bool_]  # for each n-gram that is searched for: whether a document contains it
    counts: Indices  # (groups, 3): documents, examined documents, contaminated documents
    ids: dict[int, list[str]]  # the first contaminated documents of each group

    @classmethod
    def empty(cls, n_ngrams: int, n_groups: int) -> "_Matches":
        return cls(np.zeros(n_ngrams, np.bool_), np.zeros((n_groups, 3), np.int64), {})

    def add(self, other: "_Matches") -> None:
        self.occurs |= other.occurs
        self.counts += other.counts
        for group, ids in other.ids.items():
            self.ids[group] = [*self.ids.get(group, []), *ids][:_MAX_IDS]


def report_contamination(raw: Path, path: Path, params: SplitParams, collect: CollectParams, seed: int) -> None:
    """Write to `path` how many documents of each group are contaminated; `raw` is the corpus.

    Raises InputError if a held-out group has a larger share than `split.max_contamination`.
    """
    verify_corpus(raw)
    shards = shard_paths(raw)
    groups = [*SIDES, *(f"benchmark-{i}" for i in range(len(params.benchmarks)))]

    def train() -> Iterator[ReadBlocks]:
        return (partial(_shard_blocks, shard, params, seed, is_train=True) for shard in shards)

    def held_out() -> Iterator[ReadBlocks]:
        yield from (partial(_shard_blocks, shard, params, seed, is_train=False) for shard in shards)
        for group, source in enumerate(params.benchmarks, start=len(SIDES)):
            yield from _benchmark_work(chain.from_iterable(read_source(source, collect)), group)

    ngrams, every_nth = _held_out_ngrams(held_out(), params.ngram)
    in_train = _search(train(), ngrams, params.ngram, len(groups))
    in_held_out = _search(held_out(), ngrams[in_train.occurs], params.ngram, len(groups), every_nth)

    report = _report(groups, in_train.counts + in_held_out.counts)
    report["ids"] = {groups[group]: ids for group, ids in in_held_out.ids.items()}
    report["every_nth"] = every_nth
    write_json(path, report)
    _check_shares(report, params)


def _report(groups: list[str], counts: Indices) -> dict[str, Any]:
    """Counts of each group that has documents, and the contaminated share of its examined documents."""
    report: dict[str, Any] = {}
    shares: dict[str, float] = {}
    for group, (n_documents, n_examined, n_contaminated) in zip(groups, counts.tolist(), strict=True):
        if n_documents:
            report[f"{group}_documents"] = n_documents
            report[f"{group}_examined"] = n_examined
            report[f"{group}_contaminated"] = n_contaminated
            shares[group] = n_contaminated / max(1, n_examined)
    return {**report, "share": shares}


def _check_shares(report: dict[str, Any], params: SplitParams) -> None:
    if params.max_contamination is None:
        return
    for group, share in report["share"].items():
        if group != "train" and share > params.max_contamination:
            ids = report["ids"][group]
            counts = f"{report[f'{group}_contaminated']} of {report[f'{group}_examined']} examined documents"
            raise InputError(
                f"split: {counts} of {group} ({share:.2%}) share {params.ngram} words in a row with train, above "
                f"split.max_contamination; remove them, or raise the limit; the first {len(ids)} are: {', '.join(ids)}"
            )


def _shard_blocks(shard: Path, params: SplitParams, seed: int, *, is_train: bool) -> Iterator[_Block]:
    """The train documents of a shard of the corpus, or its val and test documents."""
    for batch in read_parquet(shard, ["id", "text"]):
        sides = sides_of(strings(batch, "id"), params.fractions, seed)
        is_chosen = (sides == SIDES.index("train")) == is_train
        documents = batch.filter(pa.array(is_chosen))
        yield from _cut_into_blocks(sides[is_chosen], strings(documents, "id"), strings(documents, "text"))


def _benchmark_work(source: Iterable[str | Rejected], group: int) -> Iterator[ReadBlocks]:
    """The texts of a benchmark in units of about one block.

    Ids are numbers of pieces, in the order in which they are read; `read` cuts long texts into pieces.
    """
    ids: list[str] = []
    texts: list[str] = []
    n_characters = 0
    for number, text in enumerate(source, start=1):
        if isinstance(text, Rejected):
            continue
        ids.append(f"number {number}")
        texts.append(text.replace("\0", " "))
        n_characters += len(text)
        if n_characters >= _BLOCK_CHARACTERS:
            yield partial(_cut_into_blocks, np.full(len(ids), group), ids, texts)
            ids, texts, n_characters = [], [], 0
    if ids:
        yield partial(_cut_into_blocks, np.full(len(ids), group), ids, texts)


def _cut_into_blocks(groups: Indices, ids: list[str], texts: list[str]) -> Iterator[_Block]:
    """Group consecutive texts into blocks. A text is never split."""
    block_of_text = np.cumsum([len(text) for text in texts]) // _BLOCK_CHARACTERS
    first_of_block = np.flatnonzero(np.diff(block_of_text)) + 1
    for start, end in pairwise([0, *first_of_block, len(texts)]):
        yield _Block(groups[start:end], ids[start:end], texts[start:end])


def _held_out_ngrams(work: Iterator[ReadBlocks], n: int) -> tuple[Hashes, int]:
    """Distinct n-grams of the held-out documents, or of one in `every_nth`, the second result."""
    sample = np.empty((2, 0), np.uint64)
    every_nth = 1
    for ranked in map_in_order(partial(_ranked_ngrams, n=n), work, threads=True):
        sample = np.concatenate([sample, ranked[:, _is_sampled(ranked[0], every_nth)]], axis=1)
        if sample.shape[1] > 3 * _MAX_NGRAMS // 2:  # not at each excess: sorting takes longer than hashing
            sample, every_nth = _shrink(sample, every_nth)
    sample, every_nth = _shrink(sample, every_nth)
    return sample[1], every_nth


def _ranked_ngrams(read_blocks: ReadBlocks, *, n: int) -> Hashes:
    """Rank of the document and hash (2, n-grams) of each distinct n-gram."""
    ranked = [np.empty((2, 0), np.uint64)]
    for block in read_blocks():
        hashes, text_of_ngram = hash_ngrams(block.texts, n)
        ranked.append(np.stack([_document_ranks(hashes, text_of_ngram), hashes]))
    return _distinct(np.concatenate(ranked, axis=1))


def _document_ranks(hashes: Hashes, text_of_ngram: Indices) -> Hashes:
    """For each n-gram the pseudo-random rank of its document, derived from all n-grams of the document."""
    _, starts, n_ngrams = np.unique(text_of_ngram, return_index=True, return_counts=True)
    ranks = np.add.reduceat(hashes, starts) * _RANK_FACTOR
    return np.repeat(ranks, n_ngrams)


def _is_sampled(ranks: Hashes, every_nth: int) -> npt.NDArray[np.bool_]:
    return np.asarray(ranks <= np.uint64((2**64 - 1) // every_nth))


def _shrink(sample: Hashes, every_nth: int) -> tuple[Hashes, int]:
    """Keep the distinct n-grams; while there are more than _MAX_NGRAMS, sample half as many documents."""
    sample = _distinct(sample)
    while sample.shape[1] > _MAX_NGRAMS:
        every_nth *= 2
        sample = sample[:, _is_sampled(sample[0], every_nth)]
    return sample, every_nth


def _distinct(ranked: Hashes) -> Hashes:
    """Each distinct n-gram with the lowest rank of the documents that contain it."""
    by_rank = ranked[:, np.argsort(ranked[0])]
    _, first = np.unique(by_rank[1], return_index=True)
    return by_rank[:, first]


def _search(work: Iterator[ReadBlocks], ngrams: Hashes, n: int, n_groups: int, every_nth: int = 1) -> _Matches:
    """Search all documents for the n-grams.

    With `every_nth` > 1, search only the documents that were sampled for collecting n-grams.
    """
    index = pd.Index(ngrams)
    index.get_indexer(index[:1])  # builds its table before threads share it; two at once could see half a table
    matches = _Matches.empty(len(ngrams), n_groups)
    search = partial(_search_blocks, ngrams=index, n=n, n_groups=n_groups, every_nth=every_nth)
    for part in map_in_order(search, work, threads=True):
        matches.add(part)
    return matches


def _search_blocks(read_blocks: ReadBlocks, *, ngrams: pd.Index, n: int, n_groups: int, every_nth: int) -> _Matches:
    matches = _Matches.empty(len(ngrams), n_groups)
    for block in read_blocks():
        hashes, text_of_ngram = hash_ngrams(block.texts, n)
        if every_nth > 1:
            is_sampled = _is_sampled(_document_ranks(hashes, text_of_ngram), every_nth)
            hashes, text_of_ngram = hashes[is_sampled], text_of_ngram[is_sampled]
        positions = ngrams.get_indexer(pd.Index(hashes))
        is_match = positions >= 0
        examined, contaminated = np.unique(text_of_ngram), np.unique(text_of_ngram[is_match])

        occurs = np.zeros(len(ngrams), np.bool_)
        occurs[positions[is_match]] = True
        texts_of_columns = (block.groups, block.groups[examined], block.groups[contaminated])
        counts = np.stack([np.bincount(groups, minlength=n_groups) for groups in texts_of_columns], axis=1)
        ids: dict[int, list[str]] = {}
        for i in contaminated:
            ids.setdefault(int(block.groups[i]), []).append(block.ids[i])
        matches.add(_Matches(occurs, counts, ids))
    return matches

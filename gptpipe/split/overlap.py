"""Contamination: runs of words that held-out text shares with train (Brown et al., 2020, arXiv:2005.14165, app. C)."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import lru_cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from gptpipe.base.files import write_json
from gptpipe.base.parallel import map_in_order
from gptpipe.base.parquet import read_parquet, strings
from gptpipe.collect.batch import Rejected
from gptpipe.collect.dedup import CHARACTERS
from gptpipe.collect.params import CollectParams
from gptpipe.collect.readers import read
from gptpipe.formats.corpus import shard_paths, verify_corpus
from gptpipe.formats.sides import SIDES, sides_of
from gptpipe.shell.errors import InputError
from gptpipe.split.params import SplitParams

_LARGEST = 1 << 20  # n-grams of held-out text in memory; of text with more, each 2nd, 4th, ... document is examined
_BLOCK = 1 << 18  # characters that a thread hashes at once, 60 bytes of memory each; a document is never cut
_BASES = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93)  # of bytes in words, words in n-grams; odd: with inverses mod 2**64
# Bytes of UTF-8 as they are compared: ASCII letters small, what is in no word as a space; a document ends with a line.
_PLAIN = bytes(c if c > 127 or c in b"\n_" or chr(c).isalnum() else 32 for c in range(256)).lower()
_BETWEEN, _ALONE = re.compile(f"[^\\w\x00-\x7f{CHARACTERS}]+"), re.compile(f"[{CHARACTERS}]")
_LISTED = 20  # ids of a group, for the report

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class _Texts(NamedTuple):
    """About _BLOCK characters together."""

    groups: Indices  # of each text: its place in SIDES, or behind them its benchmark's
    ids: list[str]
    texts: list[str]


Job = Callable[[], Iterator[_Texts]]  # reads a shard, in a thread or on another machine, or has a few texts with it


class _Found(NamedTuple):
    is_there: Mask  # of each key, whether a text has it
    counts: Indices  # (groups, 3): documents; of them, examined: with an n-gram; of those, contaminated: with a key
    ids: dict[int, list[str]]  # the first contaminated ones by group


def report_contamination(raw: Path, path: Path, params: SplitParams, collect: CollectParams, seed: int) -> None:
    """Write to `path` how many documents of val, test and each benchmark share `split.ngram` words in a row with train.

    Words in lower case, without punctuation: the figure is the same under every tokenizer and layout, as one in tokens
    would not be. Of very much held-out text one in `every_nth` documents, drawn by its words, is examined: the shares
    are estimates then, and memory is bounded. Reads `raw`, the corpus, three times. Raises InputError for a share above
    `split.max_contamination`.
    """
    verify_corpus(raw)
    shards = shard_paths(raw)
    names = [*SIDES, *(f"benchmark-{i}" for i in range(len(params.benchmarks)))]

    def held_out() -> Iterator[Job]:
        yield from (partial(_of_shard, shard, params, seed, is_train=False) for shard in shards)
        for group, source in enumerate(params.benchmarks, len(SIDES)):
            yield from _of_benchmark(chain.from_iterable(read(source, collect, Counter(), {})), group)

    keys, step = _sample(map_in_order(partial(_ranked_hashes, n=params.ngram), held_out(), threads=True))
    train = (partial(_of_shard, shard, params, seed, is_train=True) for shard in shards)
    in_train = _find(keys, train, params.ngram, len(names), 1)
    found = _find(keys[in_train.is_there], held_out(), params.ngram, len(names), step)
    report, shares = dict[str, int](), dict[str, float]()
    for name, (documents, examined, contaminated) in zip(names, (in_train.counts + found.counts).tolist(), strict=True):
        if documents:
            report |= {f"{name}_documents": documents, f"{name}_examined": examined}
            report |= {f"{name}_contaminated": contaminated}
            shares[name] = contaminated / max(1, examined)
    ids = {names[group]: some for group, some in found.ids.items()}
    write_json(path, {**report, "share": shares, "ids": ids, "every_nth": step})
    for name, share in shares.items():
        if params.max_contamination is not None and name != "train" and share > params.max_contamination:
            raise InputError(f"split: {share:.2%} of {name} share {params.ngram} words in a row with train, above "
                             f"split.max_contamination; remove {', '.join(ids[name])}, or raise it")  # fmt: skip


def _of_shard(shard: Path, params: SplitParams, seed: int, *, is_train: bool) -> Iterator[_Texts]:
    """The train documents of a shard, or the others."""
    for batch in read_parquet(shard, ["id", "text"]):
        sides = sides_of(strings(batch, "id"), params.fractions, seed)
        chosen = (sides == SIDES.index("train")) == is_train
        documents = batch.filter(pa.array(chosen))
        yield from _blocks(sides[chosen], strings(documents, "id"), strings(documents, "text"))


def _of_benchmark(source: Iterable[str | Rejected], group: int) -> Iterator[Job]:
    ids, texts, size = list[str](), list[str](), 0
    for number, text in enumerate(chain(source, [None]), 1):
        if isinstance(text, str):
            ids.append(f"number {number}")
            texts.append(text.replace("\0", " "))
            size += len(text)
        if ids and (text is None or size >= _BLOCK):
            yield partial(_blocks, np.full(len(ids), group), ids, texts)
            ids, texts, size = [], [], 0


def _blocks(groups: Indices, ids: list[str], texts: list[str]) -> Iterator[_Texts]:
    of_block = np.cumsum([len(text) for text in texts]) // _BLOCK
    for start, end in pairwise([0, *np.flatnonzero(np.diff(of_block)) + 1, len(texts)]):
        yield _Texts(groups[start:end], ids[start:end], texts[start:end])


def _ranked_hashes(job: Job, *, n: int) -> Hashes:
    """Ranks and hashes (2, some) of the distinct n-grams."""
    return _lowest([np.stack([_ranks(hashes, owners), hashes]) for _, hashes, owners in _ngrams(job(), n)])


def _ranks(hashes: Hashes, owners: Indices) -> Hashes:
    """For each n-gram a number as good as drawn, which depends on the words of its whole document alone."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    ranks = np.add.reduceat(hashes, starts) * np.uint64(_BASES[0])
    return np.repeat(ranks, np.diff(starts, append=len(owners)))


def _lowest(ranked: list[Hashes]) -> Hashes:
    """Each distinct hash with the lowest of its ranks. Empties the list: memory is short."""
    pairs = np.concatenate([np.empty((2, 0), np.uint64), *ranked], axis=1)
    ranked.clear()
    pairs = pairs[:, np.argsort(pairs[0])]
    return pairs[:, np.unique(pairs[1], return_index=True)[1]]


def _sample(arrays: Iterable[Hashes]) -> tuple[Hashes, int]:
    """The distinct hashes; of more than _LARGEST those in documents of low rank, and that these are one in how many."""
    some, step = [np.empty((2, 0), np.uint64)], 1
    for ranked in chain(arrays, [None]):
        if ranked is not None:
            some.append(ranked[:, ranked[0] <= _highest(step)])
        if ranked is None or sum(part.shape[1] for part in some) > 3 * _LARGEST // 2:
            some = [_lowest(some)]
            while some[0].shape[1] > _LARGEST:
                step *= 2
                some = [some[0][:, some[0][0] <= _highest(step)]]
    return some[0][1], step


def _highest(step: int) -> np.uint64:
    """Rank of one document in `step`."""
    return np.uint64((2**64 - 1) // step)


def _find(keys: Hashes, jobs: Iterable[Job], n: int, n_groups: int, step: int) -> _Found:
    """Which keys the texts have, examining one in `step` of them."""
    table = pd.Index(keys)
    table.get_indexer(table[:1])  # builds it: two threads at once could see half of it (under Ray each task builds one)
    total = _nothing(keys, n_groups)
    for found in map_in_order(partial(_find_in, keys=table, n=n, n_groups=n_groups, step=step), jobs, threads=True):
        total.is_there[:] |= found.is_there
        total.counts[:] += found.counts
        for group, ids in found.ids.items():
            total.ids[group] = [*total.ids.get(group, []), *ids][:_LISTED]
    return total


def _find_in(job: Job, *, keys: pd.Index, n: int, n_groups: int, step: int) -> _Found:
    total = _nothing(keys, n_groups)
    for texts, hashes, owners in _ngrams(job(), n):
        if step > 1:
            examined = _ranks(hashes, owners) <= _highest(step)
            hashes, owners = hashes[examined], owners[examined]
        at = keys.get_indexer(pd.Index(hashes))
        total.is_there[at[at >= 0]] = True
        contaminated = _distinct(owners[at >= 0])
        for column, groups in enumerate((texts.groups, texts.groups[_distinct(owners)], texts.groups[contaminated])):
            total.counts[:, column] += np.bincount(groups, minlength=n_groups)
        for i in contaminated:
            if len(ids := total.ids.setdefault(int(texts.groups[i]), [])) < _LISTED:
                ids.append(texts.ids[i])
    return total


def _nothing(keys: Sized, n_groups: int) -> _Found:
    return _Found(np.zeros(len(keys), bool), np.zeros((n_groups, 3), np.int64), {})


def _distinct(ascending: Indices) -> Indices:
    return ascending[np.flatnonzero(np.diff(ascending, prepend=-1))]


def _ngrams(blocks: Iterable[_Texts], n: int) -> Iterator[tuple[_Texts, Hashes, Indices]]:
    """Each block of texts, hashes of their runs of n words, and the index of the text of each."""
    for block in blocks:
        plain = (text if text.isascii() else _plain(text) for text in block.texts)
        joined = "\0".join(plain).replace("\n", " ").replace("\0", "\n")  # no clean text has that character
        data = np.frombuffer(joined.encode().translate(_PLAIN), np.uint8)
        is_word = np.concatenate([[False], data > 32, [False]])
        starts, ends = np.flatnonzero(is_word[1:] > is_word[:-1]), np.flatnonzero(is_word[1:] < is_word[:-1])
        owners = np.searchsorted(np.flatnonzero(data == 10), starts)
        first = np.arange(max(0, len(starts) - n + 1))
        inside = owners[first] == owners[first + n - 1]
        hashes = _runs(_runs(data.astype(np.uint64), starts, ends, _BASES[0]), first, first + n, _BASES[1])
        yield block, hashes[inside], owners[first][inside]


def _plain(text: str) -> str:
    """Small letters, spaces for what is in no word and around what is one by itself, as far as it is not ASCII."""
    return _ALONE.sub(r" \g<0> ", _BETWEEN.sub(" ", text.lower()))


def _runs(values: Hashes, starts: Indices, ends: Indices, base: int) -> Hashes:
    """A polynomial modulo 2**64 of the values from each start to its end, by differences of one running sum."""
    size = 1 << len(values).bit_length()
    powers, inverses = _powers(base, size)[: len(values)], _powers(pow(base, -1, 1 << 64), size)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    return np.asarray((sums[ends] - sums[starts]) * inverses[starts], np.uint64)


@lru_cache(32)
def _powers(base: int, n: int) -> Hashes:
    powers: Hashes = np.cumprod(np.full(n, base, np.uint64), dtype=np.uint64)
    return powers

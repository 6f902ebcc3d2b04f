"""Duplicates across all sources: equal texts as they come, near-duplicates over finished shards."""

import re
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from gptpipe.base.parallel import map_in_order
from gptpipe.base.parquet import read_parquet, strings
from gptpipe.shell.environment import optional_module
from gptpipe.shell.locks import disk_errors

_RECENT = 1 << 16  # ids that wait to be merged with the others
_VALUES = 128  # of a signature, 4 bytes each
_BAND = 4  # values that agree between candidates: 32 bands find 99.9% of the pairs of similarity 0.7, 87% of 0.5
_SHINGLE = 5  # words
_ROWS = 1 << 14  # signatures in memory at once
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"  # characters of scripts without spaces; each counts as a word
_WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


class Seen:
    """Which ids came before, by their first 8 bytes: that two of a billion texts share them has a chance of 3%.

    Of memory an id takes 8 bytes, and 8 more for a moment now and then.
    """

    def __init__(self) -> None:
        self._recent = self._others = np.empty(0, np.uint64)  # both sorted

    def add(self, ids: list[str]) -> npt.NDArray[np.bool_]:
        """Note ids, and say of each whether it was there before."""
        if len(self._recent) > _RECENT:
            self._others, self._recent = _merged(self._others, self._recent), self._recent[:0]
        keys, first = np.unique(_keys(ids), return_index=True)
        is_new = ~(_are_in(self._recent, keys) | _are_in(self._others, keys))
        self._recent = _merged(self._recent, keys[is_new])
        there = np.ones(len(ids), np.bool_)
        there[first[is_new]] = False
        return there

    def forget(self, ids: list[str]) -> None:
        """Ids of the last call of `add`."""
        self._recent = np.setdiff1d(self._recent, _keys(ids), assume_unique=True)


def _keys(ids: list[str]) -> Keys:
    return np.frombuffer(bytes.fromhex("".join(ids)), np.uint64)[::4]


def _are_in(some: Keys, keys: Keys) -> npt.NDArray[np.bool_]:
    at = np.searchsorted(some, keys)
    found = at < len(some)
    found[found] = some[at[found]] == keys[found]
    return found


def _merged(one: Keys, other: Keys) -> Keys:
    both = np.concatenate([one, other])
    both.sort(kind="stable")  # merges what is in order already, in place
    return both


def near_duplicates(shards: list[Path], similarity: float, scratch: Path) -> npt.NDArray[np.bool_]:
    """For each document of the shards, in order: whether it belongs to the cluster of one before it.

    MinHash (Broder, 1997) over shingles of five words. Documents whose signatures agree in a band, and in a share of
    all values of at least `similarity` (an estimate of their Jaccard similarity, standard error at most 0.045), are in
    one cluster, and so is whatever else is so close to one of them. Only the first of a cluster stays, so none can lie
    on two sides of a split. Per million documents: 512 MB in the file `scratch`, 110 MB of memory.
    """
    sizes = [pq.read_metadata(shard).num_rows for shard in shards]
    n = sum(sizes)
    with disk_errors(scratch), scratch.open("wb") as file:
        file.truncate(n * _VALUES * 4)
    jobs = [(shard, sum(sizes[:i])) for i, shard in enumerate(shards)]
    list(map_in_order(partial(_write_signatures, scratch=scratch), jobs))
    first = np.arange(n)  # of each document's cluster
    for band in range(0, _VALUES, _BAND):
        for pairs in _candidates(scratch, n, band):
            fresh = pairs[:, first[pairs[0]] != first[pairs[1]]]
            for start in range(0, fresh.shape[1], _ROWS):
                one, other = fresh[:, start : start + _ROWS]
                alike = (_signatures(scratch, n)[one] == _signatures(scratch, n)[other]).mean(axis=1) >= similarity
                _unite(first, one[alike], other[alike])
    return np.not_equal(first, np.arange(n))


def _write_signatures(job: tuple[Path, int], *, scratch: Path) -> None:
    """Sign the documents of a shard, whose first has number job[1]; runs in a worker process."""
    rensa = optional_module("rensa", "near")
    shard, row = job
    texts = chain.from_iterable(strings(batch, "text") for batch in read_parquet(shard, ["text"]))
    with scratch.open("r+b") as file:
        file.seek(row * _VALUES * 4)
        while shingles := [_shingles(text) for text in islice(texts, 256)]:
            rows = rensa.RMinHash.digest_matrix_from_token_sets(shingles, _VALUES, 0).to_rows()
            with disk_errors(scratch):
                file.write(np.array(rows, np.uint32).tobytes())
                file.flush()


def _shingles(text: str) -> list[str]:
    words = _WORD.findall(text.lower()) or [text]
    return [" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))]


def _signatures(scratch: Path, n: int) -> npt.NDArray[np.uint32]:
    """Mapped anew at each use, so that pages looked at before do not count as memory."""
    return np.memmap(scratch, np.uint32, "r", shape=(n, _VALUES))


def _candidates(scratch: Path, n: int, band: int) -> Iterator[Indices]:
    """Pairs (2, some) of documents that agree in a band: each with the one before it, and with the first."""
    keys = np.empty(n, np.uint64)
    for start in range(0, n, _ROWS):
        values = np.asarray(_signatures(scratch, n)[start : start + _ROWS, band : band + _BAND], np.uint64)
        key = np.zeros(len(values), np.uint64)
        for column in values.T:  # two keys may collide: signatures are compared afterwards
            key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys[start : start + _ROWS] = key
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    at = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    yield np.stack([order[at - 1], order[at]])
    yield np.stack([order[np.searchsorted(keys, keys[at])], order[at]])


def _unite(first: Indices, one: Indices, other: Indices) -> None:
    """Make the clusters of each pair one, named by its first document."""
    for pair in zip(one.tolist(), other.tolist(), strict=True):
        roots = [_root(first, i) for i in pair]
        first[max(roots)] = min(roots)


def _root(first: Indices, i: int) -> int:
    while first[i] != i:
        first[i] = first[first[i]]  # halves the way for the next
        i = int(first[i])
    return i

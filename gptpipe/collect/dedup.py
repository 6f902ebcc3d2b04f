"""Duplicates across all sources: equal texts while they are read, near-duplicates in finished shards."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import rensa

from gptpipe.base.parallel import map_in_order
from gptpipe.base.parquet import read_parquet, strings
from gptpipe.collect.words import hash_shingles
from gptpipe.shell.locks import disk_errors

_MAX_RECENT = 1 << 16  # ids that are not yet merged with the older ones
_VALUES = 128  # in a signature, 4 bytes each
_BAND = 4  # values in a band; 32 bands find 99.9% of the pairs with similarity 0.7, 87% of those with 0.5
_SHINGLE = 5  # words, operators and brackets
_ROWS = 1 << 14  # signatures in memory at once

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


class Seen:
    """A set of ids.

    It compares their first 8 bytes: among a billion texts, two share them with a probability of 3%. An id takes
    8 bytes of memory, and for short times 8 more.
    """

    def __init__(self) -> None:
        # Both are sorted, for binary search. New ids go to the short array, where sorting is cheap.
        self._recent = np.empty(0, np.uint64)
        self._older = np.empty(0, np.uint64)

    def add(self, ids: list[str]) -> npt.NDArray[np.bool_]:
        """Add ids; return for each whether it was in the set before, or occurs earlier in the list."""
        if len(self._recent) > _MAX_RECENT:
            self._older = _merged(self._older, self._recent)
            self._recent = self._recent[:0]
        keys, first = np.unique(_keys(ids), return_index=True)
        is_new = ~(_are_in(self._recent, keys) | _are_in(self._older, keys))
        self._recent = _merged(self._recent, keys[is_new])
        was_seen = np.ones(len(ids), np.bool_)
        was_seen[first[is_new]] = False
        return was_seen

    def forget(self, ids: list[str]) -> None:
        """Remove ids that the last call of `add` added."""
        self._recent = np.setdiff1d(self._recent, _keys(ids), assume_unique=True)


def _keys(ids: list[str]) -> Keys:
    return np.frombuffer(bytes.fromhex("".join(ids)), np.uint64)[::4]


def _are_in(sorted_keys: Keys, keys: Keys) -> npt.NDArray[np.bool_]:
    positions = np.searchsorted(sorted_keys, keys)
    is_in = positions < len(sorted_keys)
    is_in[is_in] = sorted_keys[positions[is_in]] == keys[is_in]
    return is_in


def _merged(one: Keys, other: Keys) -> Keys:
    both = np.concatenate([one, other])
    both.sort(kind="stable")  # a stable sort merges two sorted parts in linear time
    return both


def near_duplicates(shards: list[Path], similarity: float, scratch: Path) -> npt.NDArray[np.bool_]:
    """For each document of the shards, in order: whether an earlier document belongs to the same cluster.

    MinHash (Broder, 1997) over shingles of five words, operators and brackets. Two documents belong to the same
    cluster if their signatures agree in a band, and in at least a fraction `similarity` of all values. That
    fraction estimates their Jaccard similarity, with a standard error of at most 0.045. Clusters are transitive.
    Only the first document of a cluster is kept, so no cluster is on two sides of a split. A million documents need
    512 MB in the file `scratch` and 110 MB of memory.
    """
    sizes = [pq.read_metadata(shard).num_rows for shard in shards]
    n = sum(sizes)
    with disk_errors(scratch), scratch.open("wb") as file:
        file.truncate(n * _VALUES * 4)
    shards_with_offset = [(shard, sum(sizes[:i])) for i, shard in enumerate(shards)]
    list(map_in_order(partial(_write_signatures, scratch=scratch), shards_with_offset))
    parents = np.arange(n)  # of each document: itself, or an earlier document of its cluster
    for band in range(0, _VALUES, _BAND):
        for pairs in _candidates(scratch, n, band):
            apart = pairs[:, parents[pairs[0]] != parents[pairs[1]]]
            for start in range(0, apart.shape[1], _ROWS):
                one, other = apart[:, start : start + _ROWS]
                agreement = (_signatures(scratch, n)[one] == _signatures(scratch, n)[other]).mean(axis=1)
                is_similar = agreement >= similarity
                _unite(parents, one[is_similar], other[is_similar])
    return np.not_equal(parents, np.arange(n))


def _write_signatures(shard_with_offset: tuple[Path, int], *, scratch: Path) -> None:
    """Write the signatures of a shard's documents, from row `offset` of the file; runs in a worker process."""
    shard, offset = shard_with_offset
    texts = chain.from_iterable(strings(batch, "text") for batch in read_parquet(shard, ["text"]))
    with scratch.open("r+b") as file:
        file.seek(offset * _VALUES * 4)
        while batch := list(islice(texts, 256)):
            shingles = hash_shingles(batch, _SHINGLE)
            rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(*shingles, _VALUES, 0).to_rows()
            with disk_errors(scratch):
                file.write(np.array(rows, np.uint32).tobytes())
                file.flush()


def _signatures(scratch: Path, n: int) -> npt.NDArray[np.uint32]:
    """Maps the file at each use, so pages that were read before do not count as memory of this process."""
    return np.memmap(scratch, np.uint32, "r", shape=(n, _VALUES))


def _candidates(scratch: Path, n: int, band: int) -> Iterator[Indices]:
    """Pairs (2, n_pairs) of documents that agree in a band: with the previous one, then with the first."""
    keys = np.empty(n, np.uint64)
    for start in range(0, n, _ROWS):
        values = np.asarray(_signatures(scratch, n)[start : start + _ROWS, band : band + _BAND], np.uint64)
        key = np.zeros(len(values), np.uint64)
        for column in values.T:  # keys may collide, since signatures are compared afterwards
            key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys[start : start + _ROWS] = key
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    repeated = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    yield np.stack([order[repeated - 1], order[repeated]])
    first_with_key = np.searchsorted(keys, keys[repeated])
    yield np.stack([order[first_with_key], order[repeated]])


def _unite(parents: Indices, one: Indices, other: Indices) -> None:
    """Join the clusters of each pair (union-find); the root of a cluster is its first document."""
    for pair in zip(one.tolist(), other.tolist(), strict=True):
        roots = [_root(parents, i) for i in pair]
        parents[max(roots)] = min(roots)


def _root(parents: Indices, i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]  # path halving
        i = int(parents[i])
    return i

"""Finds clusters of similar documents by MinHash (Broder, 1997).

Shingles are of five words, operators and brackets.

Step 1 of collect writes two files for each part: `signatures.bin` (n, 128), the low byte of each MinHash value,
and `bands.bin` (32, n), a hash of each band of four values. 256 bytes a document.

Two documents belong to the same cluster if their signatures agree in a band, and in at least a fraction
`near_similarity` of all values. That fraction estimates their Jaccard similarity with a standard error of at
most 0.045; bytes agree by chance once in 256 values, which adds at most 0.002 at a similarity of 0.5 and above.
Clusters are transitive. Only the first document of a cluster is kept, so no cluster is on two sides of a split.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import rensa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gptpipe.base.files import new_file
from gptpipe.base.parallel import map_in_order
from gptpipe.collect.words import hash_shingles

_VALUES = 128  # in a signature
_BAND = 4  # values in a band; 32 bands find 99.9% of the pairs with similarity 0.7, 87% of those with 0.5
_N_BANDS = _VALUES // _BAND
_SHINGLE = 5  # words, operators and brackets
_TEXTS = 256  # whose signatures are computed at once
_SORTED = 1 << 22  # keys of a band that a worker sorts at once, with about 40 bytes of memory each
_COMPARED = 1 << 14  # pairs of signatures in memory at once
_PUBLISHED = (1, 2, 4, 8, 16)  # numbers of bands after which workers learn which clusters were found

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class SignatureWriter:
    """Writes the signatures and bands of a part's candidates."""

    FILES = ("signatures.bin", "bands.bin")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._signatures: list[npt.NDArray[np.uint8]] = []
        self._bands: list[npt.NDArray[np.uint32]] = []

    def add(self, texts: pa.Array) -> None:
        documents = texts.to_numpy(zero_copy_only=False).tolist()
        for start in range(0, len(documents), _TEXTS):
            shingles = hash_shingles(documents[start : start + _TEXTS], _SHINGLE)
            rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(*shingles, _VALUES, 0).to_rows()
            values = np.array(rows, np.uint32)
            self._signatures.append(values.astype(np.uint8))
            self._bands.append(_hash_bands(values))

    def close(self) -> None:
        empty = (np.empty((0, _VALUES), np.uint8), np.empty((0, _N_BANDS), np.uint32))
        contents = (np.concatenate([empty[0], *self._signatures]), np.concatenate([empty[1], *self._bands]).T)
        for name, content in zip(self.FILES, contents, strict=True):
            with new_file(self._folder / name, content.nbytes) as file:
                file.write(np.ascontiguousarray(content).data)


def _hash_bands(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A 32-bit hash of each band (n, 32). Hashes may collide: whole signatures are compared afterwards."""
    hashes = np.zeros((len(values), _N_BANDS), np.uint64)
    for column in range(_BAND):
        hashes = (hashes ^ values[:, column::_BAND]) * np.uint64(0x9E3779B97F4A7C15)
    return (hashes >> np.uint64(32)).astype(np.uint32)


class SignedPart(NamedTuple):
    """The signatures of a part, and which of its candidates are compared."""

    folder: Path
    is_kept: Mask  # (n,)


def near_duplicates(parts: list[SignedPart], similarity: float, clusters: Path, is_small: bool) -> list[Mask]:
    """For each candidate of each part: whether it is kept, and an earlier one belongs to the same cluster.

    Workers compare the documents of one band and one range of its keys at a time, unless the corpus is small.
    Most similar pairs agree in several bands. So the temporary file `clusters` tells workers what was found in
    the first bands, and they compare such pairs no more.
    """
    sizes = [int(part.is_kept.sum()) for part in parts]
    first_of_cluster = np.arange(sum(sizes))
    n_ranges = 1 + len(first_of_cluster) // _SORTED
    work = [(band, number, n_ranges) for band in range(_N_BANDS) for number in range(n_ranges)]
    find = partial(_similar_pairs, parts=parts, similarity=similarity, clusters=clusters)
    is_published = len(first_of_cluster) > 0 and not is_small
    publish_after = [n_bands * n_ranges for n_bands in _PUBLISHED] if is_published else []
    clusters.unlink(missing_ok=True)  # of a killed run
    for n_done, (one, other) in enumerate(map_in_order(find, work, small=is_small), 1):
        _unite(first_of_cluster, one, other)
        if n_done in publish_after:
            with new_file(clusters, first_of_cluster.nbytes) as file:
                file.write(first_of_cluster.data)
    clusters.unlink(missing_ok=True)
    is_duplicate = first_of_cluster != np.arange(len(first_of_cluster))
    masks = []
    for part, start, size in zip(parts, np.cumsum([0, *sizes]), sizes, strict=False):
        mask = np.zeros(len(part.is_kept), np.bool_)
        mask[part.is_kept] = is_duplicate[start : start + size]
        masks.append(mask)
    return masks


def _similar_pairs(
    work: tuple[int, int, int], *, parts: list[SignedPart], similarity: float, clusters: Path
) -> tuple[Indices, Indices]:
    """Pairs of similar documents that agree in a band whose hash is in a range; runs in a worker process.

    Pairs whose documents are in the same cluster according to the file `clusters` may be missing. Of the
    others, each document is paired with the first of its cluster, because there are fewer such pairs.
    """
    keys, documents = _keys_in_range(parts, *work)
    one, other = _pairs_with_equal_keys(keys, documents)
    if clusters.exists():
        first_of_cluster = np.memmap(clusters, np.int64, "r")
        is_open = first_of_cluster[one] != first_of_cluster[other]
        one, other = one[is_open], other[is_open]
    signatures = _Signatures(parts)
    is_similar = np.zeros(len(one), np.bool_)
    for start in range(0, len(one), _COMPARED):
        chunk = slice(start, start + _COMPARED)
        agreement = (signatures[one[chunk]] == signatures[other[chunk]]).mean(axis=1)
        is_similar[chunk] = agreement >= similarity
    return _with_the_first(one[is_similar], other[is_similar])


def _with_the_first(one: Indices, other: Indices) -> tuple[Indices, Indices]:
    """The first document of each cluster that the pairs make, with each other document of it."""
    documents, positions = np.unique(np.stack([one, other]), return_inverse=True)
    first_of_cluster = np.arange(len(documents))
    _unite(first_of_cluster, *positions.reshape(2, -1))
    is_later = first_of_cluster != np.arange(len(documents))
    return documents[first_of_cluster[is_later]], documents[is_later]


def _pairs_with_equal_keys(keys: npt.NDArray[np.uint32], documents: Indices) -> tuple[Indices, Indices]:
    """Each document with the one before it that has the same key, and with the first one that has it."""
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    repeated = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    first_with_key = np.searchsorted(keys, keys[repeated])
    is_another = first_with_key != repeated - 1
    one = np.concatenate([documents[repeated - 1], documents[first_with_key[is_another]]])
    other = np.concatenate([documents[repeated], documents[repeated[is_another]]])
    return one, other


def _keys_in_range(
    parts: list[SignedPart], band: int, number: int, n_ranges: int
) -> tuple[npt.NDArray[np.uint32], Indices]:
    """The hashes of a band that are in a range, and the numbers of their documents."""
    keys = [np.empty(0, np.uint32)]
    documents = [np.empty(0, np.int64)]
    n_before = 0
    for part in parts:
        if not len(part.is_kept):  # an empty file cannot be mapped
            continue
        bands = np.memmap(part.folder / "bands.bin", np.uint32, "r", shape=(_N_BANDS, len(part.is_kept)))
        keys_of_part = bands[band][part.is_kept]
        is_in_range = keys_of_part % n_ranges == number
        keys.append(keys_of_part[is_in_range])
        documents.append(n_before + np.flatnonzero(is_in_range))
        n_before += len(keys_of_part)
    return np.concatenate(keys), np.concatenate(documents)


class _Signatures:
    """The signatures of the kept documents of all parts, by the number of the document."""

    def __init__(self, parts: list[SignedPart]) -> None:
        self._rows = [np.flatnonzero(part.is_kept) for part in parts]
        self._starts = np.cumsum([0, *map(len, self._rows)])
        self._parts = parts

    def __getitem__(self, documents: Indices) -> npt.NDArray[np.uint8]:
        signatures = np.empty((len(documents), _VALUES), np.uint8)
        part_of_document = np.searchsorted(self._starts, documents, side="right") - 1
        for number in np.unique(part_of_document):
            part = self._parts[number]
            of_part = part_of_document == number
            rows = self._rows[number][documents[of_part] - self._starts[number]]
            # Mapped at each use, so pages that were read before do not count as memory of this process.
            stored = np.memmap(
                part.folder / "signatures.bin", np.uint8, "r", shape=(len(part.is_kept), _VALUES)
            )
            signatures[of_part] = stored[rows]
        return signatures


def _unite(first_of_cluster: Indices, one: Indices, other: Indices) -> None:
    """Join the clusters of each pair of documents.

    `first_of_cluster` (n,) is updated: it has an earlier document of the same cluster, or the document if it is
    the first. Only documents of the pairs are touched, because this is done for each band and range.
    """
    one, other = _firsts(first_of_cluster, one), _firsts(first_of_cluster, other)
    is_open = one != other
    if not is_open.any():
        return
    one, other = one[is_open], other[is_open]
    nodes, positions = np.unique(np.stack([one, other]), return_inverse=True)
    row, column = positions.reshape(2, -1)
    graph = coo_array((np.ones(len(row), np.bool_), (row, column)), (len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    _, first_with_label = np.unique(labels, return_index=True)  # nodes are sorted, so the first is the earliest
    first_of_cluster[nodes] = nodes[first_with_label][labels]


def _firsts(first_of_cluster: Indices, documents: Indices) -> Indices:
    """The first document of the cluster of each document."""
    earlier = first_of_cluster[documents]
    while not np.array_equal(earlier, documents):
        documents, earlier = earlier, first_of_cluster[earlier]
    return documents

"""Contamination: runs of words that held-out text shares with train (Brown et al., 2020, arXiv:2005.14165, app. C)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, groupby, islice, tee
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptpipe.config import CollectParams, SplitParams
from gptpipe.corpus.dedup import WORD
from gptpipe.corpus.shards import read_documents, shard_paths
from gptpipe.corpus.sources import read
from gptpipe.errors import InputError
from gptpipe.files import verify, write_json
from gptpipe.parallel import map_in_order
from gptpipe.tokens.splits import side_of

_LARGEST = 1 << 21  # n-grams of held-out text in memory, 8 bytes each; of more, every 2nd, 4th, ... by hash
_BLOCK = 1 << 16  # characters hashed at once, 60 bytes of memory each; a document is never cut
_BASES = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93)  # of bytes in words, words in n-grams; odd: with inverses mod 2**64
_SEPARATED = bytes(c if c > 127 or c == 10 or chr(c).isalnum() or chr(c) == "_" else 32 for c in range(256))

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Texts = Iterable[tuple[str, str, str]]  # group, id, text


def report_contamination(raw: Path, path: Path, params: SplitParams, collect: CollectParams, seed: int) -> None:
    """Write to `path` how many documents of val, test and each benchmark share `split.ngram` words in a row with train.

    Words in lower case, without punctuation: the figure is the same under every tokenizer and layout, as one in tokens
    would not be. Reads `raw`, the corpus, three times. Raises InputError for a share above `split.max_contamination`.
    """
    verify(raw)
    shards = shard_paths(raw)
    held_out = partial(_texts, shards, params, collect, seed, False)
    of_train = [partial(_texts, [shard], params, collect, seed, True) for shard in shards]
    keys, step, arrays = np.empty(0, np.uint64), 1, (hashes for _, hashes, _ in _ngrams(held_out(), params.ngram))
    while some := list(islice(arrays, 64)):
        keys = np.union1d(keys, np.concatenate(some))
        while len(keys := keys[keys <= np.uint64(((1 << 64) - 1) // step)]) > _LARGEST:
            step *= 2
    in_train, counts = np.zeros(len(keys), bool), Counter[str]()
    for hits, found, _ in map_in_order(partial(_matches, keys=keys, n=params.ngram), of_train):
        in_train[hits] = True
        counts.update(found)
    _, found, ids = _matches(held_out, keys=keys[in_train], n=params.ngram)
    counts.update(found)
    groups = sorted({name.rpartition("_")[0] for name in counts})
    shares = {name: counts[f"{name}_contaminated"] / max(1, counts[f"{name}_examined"]) for name in groups}
    write_json(path, {**counts, "share": shares, "ids": ids, "every_nth": step})
    for name, share in shares.items():
        if params.max_contamination is not None and name != "train" and share > params.max_contamination:
            raise InputError(f"split: {share:.2%} of {name} share {params.ngram} words in a row with train, above "
                             f"split.max_contamination; remove {', '.join(ids[name])}, or raise it")  # fmt: skip


def _texts(shards: list[Path], params: SplitParams, collect: CollectParams, seed: int, is_train: bool) -> Texts:
    """The train documents, or those that are held out and the benchmarks."""
    for shard in shards:
        for document_id, document in read_documents(shard):
            if ((side := side_of(document_id, params, seed)) == "train") == is_train:
                yield side, document_id, document.text
    for i, source in enumerate(() if is_train else params.benchmarks):
        for number, text in enumerate(read(source, collect, Counter(), {}), 1):
            if isinstance(text, str):
                yield f"benchmark-{i}", f"number {number}", text


def _matches(texts: Callable[[], Texts], *, keys: Hashes, n: int) -> tuple[Indices, Counter[str], dict[str, list[str]]]:
    """Which of the sorted keys the texts hold; counts of texts, and the first ids, by group. Runs in a worker too."""
    hits, counts, ids = [np.empty(0, np.int64)], Counter[str](), dict[str, list[str]]()
    padded = np.append(keys, np.uint64(0))
    for block, hashes, owners in _ngrams(texts(), n):
        equal = padded[at := np.searchsorted(keys, hashes)] == hashes
        hits.append(np.unique(at[equal]))
        counts.update(f"{name}_documents" for name, _, _ in block)
        counts.update(f"{block[i][0]}_examined" for i in np.unique(owners))
        for name, document_id, _ in (block[i] for i in np.unique(owners[equal])):
            counts[f"{name}_contaminated"] += 1
            if counts[f"{name}_contaminated"] <= 20:  # for the report
                ids.setdefault(name, []).append(document_id)
    return np.concatenate(hits), counts, ids


def _ngrams(texts: Texts, n: int) -> Iterator[tuple[list[tuple[str, str, str]], Hashes, Indices]]:
    """Texts of about _BLOCK characters together, hashes of their runs of n words, and the index of the text of each."""
    one, other = tee(texts)
    sizes = accumulate(len(text) for _, _, text in one)
    for _, group in groupby(zip(sizes, other, strict=True), lambda pair: pair[0] // _BLOCK):
        block = [text for _, text in group]
        lower = (text.replace("\n", " ").lower() for _, _, text in block)
        words = (text if text.isascii() else " ".join(WORD.findall(text)) for text in lower)
        data = np.frombuffer("\n".join(words).encode().translate(_SEPARATED), np.uint8)
        is_word = np.concatenate([[False], data > 32, [False]])
        starts, ends = np.flatnonzero(is_word[1:] > is_word[:-1]), np.flatnonzero(is_word[1:] < is_word[:-1])
        owners = np.searchsorted(np.flatnonzero(data == 10), starts)
        first = np.arange(max(0, len(starts) - n + 1))
        inside = owners[first] == owners[first + n - 1]
        hashes = _runs(_runs(data.astype(np.uint64), starts, ends, _BASES[0]), first, first + n, _BASES[1])
        yield block, hashes[inside], owners[first][inside]


def _runs(values: Hashes, starts: Indices, ends: Indices, base: int) -> Hashes:
    """A polynomial modulo 2**64 of the values from each start to its end, by differences of one running sum."""
    powers, inverses = (np.cumprod(np.full(len(values) + 1, b, np.uint64)) for b in (base, pow(base, -1, 1 << 64)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers[:-1])])
    return np.asarray((sums[ends] - sums[starts]) * inverses[starts], np.uint64)

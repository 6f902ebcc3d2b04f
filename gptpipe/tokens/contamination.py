"""Contamination: runs of words that held-out text shares with train (Brown et al., 2020, arXiv:2005.14165, app. C)."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.config import CollectParams, SplitParams
from gptpipe.corpus.dedup import WORD
from gptpipe.corpus.shards import shard_paths
from gptpipe.corpus.sources import read
from gptpipe.errors import InputError
from gptpipe.files import verify, write_json
from gptpipe.parallel import map_in_order
from gptpipe.parquet import read_parquet, strings
from gptpipe.tokens.splits import SIDES, sides_of

_LARGEST = 1 << 21  # n-grams of held-out text in memory, 8 bytes each; of more, every 2nd, 4th, ... by hash
_BLOCK = 1 << 16  # characters hashed at once, 60 bytes of memory each; a document is never cut
_PARTS = 1 << 24  # of hashes, by some of their bits, in a table of 16 MB: most are told apart by one look
_BASES = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93)  # of bytes in words, words in n-grams; odd: with inverses mod 2**64
_SEPARATED = bytes(c if c > 127 or c == 10 or chr(c).isalnum() or chr(c) == "_" else 32 for c in range(256))

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Texts = Iterator[tuple[list[str], list[str], list[str]]]  # groups, ids and texts of about _BLOCK characters together


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
    for is_there, found, _ in map_in_order(partial(_matches, keys=keys, n=params.ngram), of_train):
        in_train |= is_there
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
    for batch in chain.from_iterable(read_parquet(shard, ["id", "text"]) for shard in shards):
        sides = sides_of(strings(batch, "id"), params, seed)
        chosen = (sides == SIDES.index("train")) == is_train
        found = batch.filter(pa.array(chosen))
        yield from _blocks([SIDES[i] for i in sides[chosen]], strings(found, "id"), strings(found, "text"))
    for i, source in enumerate(() if is_train else params.benchmarks):
        numbered = enumerate(read(source, collect, Counter(), {}), 1)
        texts = ((f"number {number}", text.replace("\0", " ")) for number, text in numbered if isinstance(text, str))
        while some := list(islice(texts, 64)):
            yield from _blocks([f"benchmark-{i}"] * len(some), *map(list, zip(*some, strict=True)))


def _blocks(groups: list[str], ids: list[str], texts: list[str]) -> Texts:
    of_block = np.cumsum([len(text) for text in texts]) // _BLOCK
    for start, end in pairwise([0, *np.flatnonzero(np.diff(of_block)) + 1, len(texts)]):
        yield groups[start:end], ids[start:end], texts[start:end]


def _matches(texts: Callable[[], Texts], *, keys: Hashes, n: int) -> tuple[Mask, Counter[str], dict[str, list[str]]]:
    """Which of the sorted keys the texts hold; counts of texts, and the first ids, by group. Runs in a worker too."""
    is_there, counts, listed = np.zeros(len(keys), bool), Counter[str](), dict[str, list[str]]()
    has_key = np.zeros(_PARTS, bool)
    has_key[_part(keys)] = True
    padded = np.append(keys, np.uint64(0))
    for (groups, ids, _), hashes, owners in _ngrams(texts(), n):
        likely = np.flatnonzero(has_key[_part(hashes)])
        at = np.searchsorted(keys, hashes[likely])
        equal = padded[at] == hashes[likely]
        is_there[at[equal]] = True
        contaminated = _distinct(owners[likely[equal]])
        found = {"documents": range(len(ids)), "examined": _distinct(owners), "contaminated": contaminated}
        for what, indices in found.items():
            counts.update({f"{name}_{what}": k for name, k in Counter(groups[i] for i in indices).items()})
        for i in contaminated:
            if len(of_group := listed.setdefault(groups[i], [])) < 20:  # for the report
                of_group.append(ids[i])
    return is_there, counts, listed


def _part(hashes: Hashes) -> Hashes:
    return hashes >> np.uint64(20) & np.uint64(_PARTS - 1)


def _distinct(ascending: Indices) -> Indices:
    return ascending[np.flatnonzero(np.diff(ascending, prepend=-1))]


def _ngrams(texts: Texts, n: int) -> Iterator[tuple[Any, Hashes, Indices]]:
    """Each block of texts, hashes of their runs of n words, and the index of the text of each."""
    for block in texts:
        lower = "\0".join(block[2]).replace("\n", " ").lower()  # no clean text has that character
        if not lower.isascii():
            words = (text if text.isascii() else " ".join(WORD.findall(text)) for text in lower.split("\0"))
            lower = "\0".join(words)
        data = np.frombuffer(lower.replace("\0", "\n").encode().translate(_SEPARATED), np.uint8)
        is_word = np.concatenate([[False], data > 32, [False]])
        starts, ends = np.flatnonzero(is_word[1:] > is_word[:-1]), np.flatnonzero(is_word[1:] < is_word[:-1])
        owners = np.searchsorted(np.flatnonzero(data == 10), starts)
        first = np.arange(max(0, len(starts) - n + 1))
        inside = owners[first] == owners[first + n - 1]
        hashes = _runs(_runs(data.astype(np.uint64), starts, ends, _BASES[0]), first, first + n, _BASES[1])
        yield block, hashes[inside], owners[first][inside]


def _runs(values: Hashes, starts: Indices, ends: Indices, base: int) -> Hashes:
    """A polynomial modulo 2**64 of the values from each start to its end, by differences of one running sum."""
    size = 1 << len(values).bit_length()
    powers, inverses = _powers(base, size)[: len(values)], _powers(pow(base, -1, 1 << 64), size)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    return np.asarray((sums[ends] - sums[starts]) * inverses[starts], np.uint64)


@lru_cache(8)
def _powers(base: int, n: int) -> Hashes:
    powers: Hashes = np.cumprod(np.full(n, base, np.uint64), dtype=np.uint64)
    return powers

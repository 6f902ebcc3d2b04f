"""Stage split: reads token shards, writes one token stream for each of train, val and test.

First the shards are counted. Then each shard's tokens have a known place in the streams, and worker processes
write shards in any order, while one of them writes the tables of documents.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.base.manifest import new_folder
from gptpipe.base.parallel import map_in_order
from gptpipe.base.parquet import read_parquet
from gptpipe.base.resume import once
from gptpipe.formats.sides import SIDES, Fractions, Side, sides_of_column
from gptpipe.formats.streams import DOCUMENTS, TOKENS, new_documents, new_tokens, tokens_at
from gptpipe.formats.token_shards import token_shard_paths, verify_tokens
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.shell.console import Progress
from gptpipe.shell.errors import InputError, IntegrityError
from gptpipe.split.params import SplitParams

_SMALL_BYTES = 1 << 28  # of text: below, starting worker processes takes about as long as the work
_COUNTS = ("documents", "tokens", "bytes")
Counts = npt.NDArray[np.int64]  # (sides, _COUNTS) of one shard


def split(source: Path, target: Path, params: SplitParams, seed: int) -> dict[str, int]:
    """Append each document of the token shards to the stream of its side, and return the counts.

    Documents keep the order of the corpus, so a window that spans documents contains related text. A process
    has one row group in memory. Raises InputError if a side with a fraction above 0 gets no document.
    """
    parent = verify_tokens(source)
    tokenizer = Tokenizer.load(source / TOKENIZER)
    is_small = parent.counts["bytes"] < _SMALL_BYTES
    shards = token_shard_paths(source)
    with new_folder(target, parent.lineage(source.name)) as folder:
        count = partial(_count_shard, fractions=params.fractions, seed=seed)
        shard_counts = list(map_in_order(count, shards, small=is_small))
        totals = np.sum(shard_counts, axis=0)
        counts = {
            f"{side}_{name}": int(totals[i, j])
            for i, side in enumerate(SIDES)
            for j, name in enumerate(_COUNTS)
        }
        _check_sides(counts, params)
        _write_streams(shards, shard_counts, folder.path, tokenizer.dtype, params, seed, is_small=is_small)
        if not is_small:  # hash the large files in workers, not at the end of the block
            files = [folder.path / side / name for side in SIDES for name in (TOKENS, DOCUMENTS)]
            list(map_in_order(_record, files))
        tokenizer.save(folder.path / TOKENIZER)
        folder.counts = counts
    return counts


def _count_shard(shard: Path, *, fractions: Fractions, seed: int) -> Counts:
    """Counts of the documents of a shard on each side; reads no tokens."""
    counts = np.zeros((len(SIDES), len(_COUNTS)), np.int64)
    for batch in read_parquet(shard, ["id", "n_tokens", "n_bytes"]):
        sides = sides_of_column(batch.column("id"), fractions, seed)
        counts[:, 0] += np.bincount(sides, minlength=len(SIDES))
        for j, name in ((1, "n_tokens"), (2, "n_bytes")):
            np.add.at(counts[:, j], sides, batch.column(name).to_numpy())
    return counts


class _Shard(NamedTuple):
    """A shard, and where its tokens of each side are in the streams."""

    path: Path
    starts: list[int]
    n_tokens: list[int]


class _Writing(NamedTuple):
    """What every item of work needs to know."""

    shards: list[Path]
    target: Path
    streams: list[Path]  # partial files of SIDES
    dtype: np.dtype[Any]
    fractions: Fractions
    seed: int

    def sides_of(self, batch: pa.RecordBatch) -> Iterator[tuple[int, pa.BooleanArray]]:
        """Each side that occurs, and which rows are on it."""
        sides = sides_of_column(batch.column("id"), self.fractions, self.seed)
        for side in np.unique(sides).tolist():
            yield side, pa.array(sides == side)


def _write_streams(
    shards: list[Path],
    shard_counts: list[Counts],
    target: Path,
    dtype: np.dtype[Any],
    params: SplitParams,
    seed: int,
    *,
    is_small: bool,
) -> None:
    n_tokens = np.array(shard_counts)[:, :, _COUNTS.index("tokens")]  # (shards, sides)
    starts = n_tokens.cumsum(axis=0) - n_tokens
    places = [_Shard(*place) for place in zip(shards, starts.tolist(), n_tokens.tolist(), strict=True)]
    totals = zip(SIDES, n_tokens.sum(axis=0).tolist(), strict=True)
    with ExitStack() as stack:
        streams = [stack.enter_context(new_tokens(target / side, dtype, total)) for side, total in totals]
        writing = _Writing(shards, target, streams, dtype, params.fractions, seed)
        write = partial(_write, writing=writing)
        progress = stack.enter_context(Progress("split", unit="shards", total=len(shards) + 1))
        for _ in progress.track(map_in_order(write, [None, *places], small=is_small, describe=_name)):
            pass


def _name(shard: _Shard | None) -> str:
    return str(shard.path) if shard else "the tables of documents"


def _write(shard: _Shard | None, *, writing: _Writing) -> None:
    """One item of work for a worker: the tokens of a shard, or the documents of all shards."""
    if shard is None:
        _write_documents(writing)
    else:
        _write_tokens(shard, writing)


def _write_tokens(shard: _Shard, writing: _Writing) -> None:
    """Write the tokens of a shard at their places in the streams."""
    places = zip(writing.streams, shard.starts, shard.n_tokens, strict=True)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(tokens_at(path, writing.dtype, start, n)) for path, start, n in places]
            for batch in read_parquet(shard.path, ["id", "tokens"]):
                for side, rows in writing.sides_of(batch):
                    files[side].write(batch.column("tokens").filter(rows).flatten().to_numpy())
    except ValueError as error:
        raise IntegrityError(f"{shard.path}: {error}; make the folder again with `dvc repro -f`") from error


def _write_documents(writing: _Writing) -> None:
    """Write the three tables of documents. A table is written from start to end, so one worker does it."""
    with ExitStack() as stack:
        tables = [stack.enter_context(new_documents(writing.target / side)) for side in SIDES]
        for shard in writing.shards:
            for batch in read_parquet(shard, ["id", "source", "n_bytes", "n_tokens"]):
                for side, rows in writing.sides_of(batch):
                    tables[side].extend(batch.filter(rows))


def _record(file: Path) -> None:
    once([file], lambda: None)


def _check_sides(counts: dict[str, int], params: SplitParams) -> None:
    """Raise InputError if a side that should have documents has none."""
    n_documents = {side: counts[f"{side}_documents"] for side in SIDES}
    fractions: dict[Side, float] = {"train": 1.0, "val": params.val_fraction, "test": params.test_fraction}
    for side, fraction in fractions.items():
        if fraction > 0 and n_documents[side] == 0:
            listed = ", ".join(f"{other} {n}" for other, n in n_documents.items())
            raise InputError(
                f"split: {side} has no document (documents: {listed}); add documents, or change "
                "split.val_fraction and split.test_fraction"
            )

"""Stage split: reads token shards, writes one token stream for each of train, val and test."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gptpipe.base.manifest import new_folder
from gptpipe.base.parquet import read_parquet, strings
from gptpipe.formats.sides import SIDES, Side, sides_of
from gptpipe.formats.streams import new_stream
from gptpipe.formats.token_shards import token_shard_paths, verify_tokens
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.shell.console import Progress
from gptpipe.shell.errors import InputError
from gptpipe.split.params import SplitParams


def split(source: Path, target: Path, params: SplitParams, seed: int) -> dict[str, int]:
    """Append each document of the token shards to the stream of its side, and return the counts.

    Documents keep the order of the corpus, so a window that spans documents contains related text. One pass,
    with one row group in memory. Raises InputError if a side with a fraction above 0 gets no document.
    """
    parent = verify_tokens(source)
    tokenizer = Tokenizer.load(source / TOKENIZER)
    with new_folder(target, parent.lineage(source.name)) as folder:
        with Progress("split", unit="documents", total=parent.counts["documents"]) as progress:
            counts = _write_streams(source, folder.path, tokenizer.dtype, params, seed, progress)
        _check_sides(counts, params)
        tokenizer.save(folder.path / TOKENIZER)
        folder.counts = counts
    return counts


def _write_streams(
    source: Path, target: Path, dtype: np.dtype[Any], params: SplitParams, seed: int, progress: Progress
) -> dict[str, int]:
    with ExitStack() as stack:
        writers = [stack.enter_context(new_stream(target / side, dtype)) for side in SIDES]
        for shard in token_shard_paths(source):
            for batch in read_parquet(shard, ["id", "source", "n_bytes", "tokens"]):
                sides = sides_of(strings(batch, "id"), params.fractions, seed)
                for side in np.unique(sides):
                    writers[side].extend(batch.filter(pa.array(sides == side)))
                progress.advance(len(batch))
    return {
        f"{side}_{name}": n for side, writer in zip(SIDES, writers, strict=True) for name, n in writer.counts.items()
    }


def _check_sides(counts: dict[str, int], params: SplitParams) -> None:
    """Raise InputError if a side that should have documents has none."""
    n_documents = {side: counts[f"{side}_documents"] for side in SIDES}
    fractions: dict[Side, float] = {"train": 1.0, "val": params.val_fraction, "test": params.test_fraction}
    for side, fraction in fractions.items():
        if fraction > 0 and n_documents[side] == 0:
            listed = ", ".join(f"{other} {n}" for other, n in n_documents.items())
            raise InputError(
                f"split: {side} has no document (documents: {listed}); add documents, or change split.val_fraction and "
                "split.test_fraction"
            )

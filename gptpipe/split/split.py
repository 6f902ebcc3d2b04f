"""Stage split as one function: token shards in, one token stream for each side out."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa

from gptpipe.base.manifest import new_folder
from gptpipe.base.parquet import read_parquet, strings, verify_rows
from gptpipe.formats.sides import SIDES, sides_of
from gptpipe.formats.streams import new_stream
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.shell.console import Progress
from gptpipe.shell.errors import InputError
from gptpipe.split.params import SplitParams


def split(source: Path, target: Path, params: SplitParams, seed: int) -> dict[str, int]:
    """Write each document of the token shards to its side, in the order of the corpus, and return the counts.

    Neighbours in the corpus stay neighbours, so that a window that spans documents has related text in it. One pass,
    one row group in memory. Raises InputError for a side that is asked for and stays empty.
    """
    parent = verify_rows(source, {"tokens-*.parquet": "documents"})
    tokenizer = Tokenizer.load(source / TOKENIZER)
    with new_folder(target, parent.lineage(source.name)) as folder:
        with ExitStack() as stack:
            sides = {side: stack.enter_context(new_stream(folder.path / side, tokenizer.dtype)) for side in SIDES}
            progress = stack.enter_context(Progress("split", unit="documents", total=parent.counts["documents"]))
            for shard in sorted(source.glob("tokens-*.parquet")):
                for batch in read_parquet(shard, ["id", "source", "n_bytes", "tokens"]):
                    places = sides_of(strings(batch, "id"), params.fractions, seed)
                    for i in np.unique(places):
                        sides[SIDES[i]].extend(batch.filter(pa.array(places == i)))
                    progress.advance(len(batch))
        counts = {f"{side}_{what}": n for side, writer in sides.items() for what, n in writer.counts.items()}
        _check_sides(counts, params)
        tokenizer.save(folder.path / TOKENIZER)
        folder.counts = counts
    return counts


def _check_sides(counts: dict[str, int], params: SplitParams) -> None:
    asked_for = {"train": 1.0, "val": params.val_fraction, "test": params.test_fraction}
    for side, fraction in asked_for.items():
        if fraction and not counts[f"{side}_documents"]:
            found = ", ".join(f"{other} {counts[f'{other}_documents']}" for other in SIDES)
            raise InputError(f"split: no document fell to {side} (documents: {found}); add documents or raise {side}'s "
                             "share in section split of params.yaml")  # fmt: skip

"""Token streams: for each side one flat, memory-mapped array of tokens and a table of the documents in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gptpipe.config import SplitParams
from gptpipe.console import Progress
from gptpipe.errors import InputError, IntegrityError
from gptpipe.files import Manifest, new_file, new_folder
from gptpipe.parquet import ParquetRows, new_parquet, read_parquet, strings, verify_rows
from gptpipe.tokens.splits import SIDES, Side, sides_of
from gptpipe.tokens.tokenizer import TOKENIZER, Tokenizer

TOKENS = "tokens.npy"
DOCUMENTS = "documents.parquet"
_SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), *((name, pa.int64()) for name in ("offset", "n_tokens", "n_bytes"))]
)


@dataclass(frozen=True)
class Stream:
    """One side: `tokens` (n_tokens,) on disk; `documents` with id, source, offset, n_tokens, n_bytes in its order."""

    tokens: npt.NDArray[np.unsignedinteger]
    documents: pd.DataFrame

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents; end-of-text tokens have none."""
        return int(self.documents["n_bytes"].sum())


def split(source: Path, target: Path, params: SplitParams, seed: int) -> dict[str, int]:
    """Write each document of the token shards to its side, in the order of the corpus, and return the counts.

    Neighbours in the corpus stay neighbours, so that a window that spans documents has related text in it. One pass,
    one row group in memory. Raises InputError for a side that is asked for and stays empty.
    """
    parent = verify_rows(source, {"tokens-*.parquet": "documents"})
    tokenizer = Tokenizer.load(source / TOKENIZER)
    with new_folder(target, parent.lineage(source.name)) as folder:
        with ExitStack() as stack:
            sides = {side: stack.enter_context(_new_side(folder.path / side, tokenizer.dtype)) for side in SIDES}
            progress = stack.enter_context(Progress("split", unit="documents", total=parent.counts["documents"]))
            for shard in sorted(source.glob("tokens-*.parquet")):
                for batch in read_parquet(shard, ["id", "source", "n_bytes", "tokens"]):
                    places = sides_of(strings(batch, "id"), params, seed)
                    for i in np.unique(places):
                        sides[SIDES[i]].extend(batch.filter(pa.array(places == i)))
                    progress.advance(len(batch))
        counts = {f"{side}_{what}": n for side, writer in sides.items() for what, n in writer.counts.items()}
        _check_sides(counts, params)
        tokenizer.save(folder.path / TOKENIZER)
        folder.counts = counts
    return counts


class _SideWriter:
    """Appends documents to one side's token array and table."""

    def __init__(self, tokens: BinaryIO, documents: ParquetRows) -> None:
        self._tokens, self._documents = tokens, documents
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def extend(self, batch: pa.RecordBatch) -> None:
        lists, n_bytes = batch.column("tokens"), batch.column("n_bytes")
        tokens, n_tokens = lists.flatten().to_numpy(), lists.value_lengths().to_numpy().astype(np.int64)
        offset = self.counts["tokens"] + n_tokens.cumsum() - n_tokens
        columns = [batch.column("id"), batch.column("source"), pa.array(offset), pa.array(n_tokens), n_bytes]
        self._documents.extend(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._tokens.write(tokens.tobytes())
        self.counts["documents"] += len(batch)
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += pc.sum(n_bytes).as_py()


@contextmanager
def _new_side(folder: Path, dtype: np.dtype[Any]) -> Iterator[_SideWriter]:
    with new_file(folder / TOKENS) as tokens, new_parquet(folder / DOCUMENTS, _SCHEMA) as documents:
        _write_header(tokens, dtype, 0)
        side = _SideWriter(tokens, documents)
        yield side
        _write_header(tokens, dtype, side.counts["tokens"])


def _write_header(file: BinaryIO, dtype: np.dtype[Any], n_tokens: int) -> None:
    """The head of an .npy file; numpy pads it, so that it has one size for every length of the array."""
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def _check_sides(counts: dict[str, int], params: SplitParams) -> None:
    asked_for = {"train": 1.0, "val": params.val_fraction, "test": params.test_fraction}
    for side, fraction in asked_for.items():
        if fraction and not counts[f"{side}_documents"]:
            found = ", ".join(f"{other} {counts[f'{other}_documents']}" for other in SIDES)
            raise InputError(f"split: no document fell to {side} (documents: {found}); add documents or raise {side}'s "
                             "share in section split of params.yaml")  # fmt: skip


def verify_split(folder: Path) -> Manifest:
    """The manifest of a split, after checking its files and the number of documents per side. Raises IntegrityError."""
    return verify_rows(folder, {f"{side}/{DOCUMENTS}": f"{side}_documents" for side in SIDES})


def open_stream(folder: Path, side: Side) -> Stream:
    """One side of the split, its tokens memory-mapped. The caller has verified the folder. Raises IntegrityError."""
    try:
        tokens = np.lib.format.open_memmap(folder / side / TOKENS, mode="r")  # of an array without objects, no zip
    except (OSError, ValueError, EOFError) as error:
        raise IntegrityError(f"{folder / side / TOKENS}: not a token stream ({error}); run `dvc repro -f`") from error
    table = pa.Table.from_batches(read_parquet(folder / side / DOCUMENTS, _SCHEMA.names), _SCHEMA)
    return Stream(tokens, table.to_pandas())

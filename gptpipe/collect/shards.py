"""Step 3 of collect: worker processes write the shards of the corpus from the kept candidates."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gptpipe.base.resume import once
from gptpipe.collect.candidates import read_candidates
from gptpipe.collect.decide import Decision
from gptpipe.formats.corpus import SCHEMA, shard_path, write_shard

SHARD_BYTES = 8 << 20  # of text; stages process one shard at a time


class Piece(NamedTuple):
    """Consecutive kept candidates of one part."""

    folder: Path
    batch_starts: list[int]  # first candidate of each record batch in the folder
    source: str  # its name
    rows: npt.NDArray[np.int64]  # ascending


class Shard(NamedTuple):
    """One file of the corpus."""

    number: int
    pieces: list[Piece]


def plan_shards(decisions: Sequence[Decision]) -> Iterator[Shard]:
    """The shards, in order. A shard ends with the document that reaches SHARD_BYTES."""
    number = 0
    pieces: list[Piece] = []
    n_bytes = 0
    for decision in decisions:
        rows = np.flatnonzero(decision.is_kept)
        candidates = decision.candidates
        ends = candidates.n_bytes[candidates.reasons == 0][rows].cumsum()
        start = 0
        while start < len(rows):
            n_before = int(ends[start - 1]) if start else 0
            n_rows = int(np.searchsorted(ends[start:] - n_before, SHARD_BYTES - n_bytes)) + 1
            taken = rows[start : start + n_rows]
            pieces.append(Piece(candidates.folder, candidates.record["batch_starts"], decision.source, taken))
            start += len(taken)
            n_bytes += int(ends[start - 1]) - n_before
            if n_bytes >= SHARD_BYTES:
                yield Shard(number, pieces)
                number, pieces, n_bytes = number + 1, [], 0
    if pieces:
        yield Shard(number, pieces)


def write_shard_of(shard: Shard, *, folder: Path) -> dict[str, int]:
    """Write a shard below `folder`, unless an interrupted run already did; runs in a worker process.

    Returns its number of documents, and of those with the replacement character U+FFFD.
    """
    path = shard_path(folder, shard.number)
    digest = hashlib.sha256()
    for piece in shard.pieces:
        digest.update(f"{piece.folder.name} {piece.source} {len(piece.rows)}\n".encode() + piece.rows.tobytes())
    return once([path], lambda: _write(path, shard.pieces), digest.hexdigest())


def _write(path: Path, pieces: list[Piece]) -> dict[str, int]:
    rows = pa.concat_tables([_rows(piece) for piece in pieces])
    write_shard(path, rows)
    n_replaced = pc.sum(pc.match_substring(rows["text"], "\ufffd")).as_py() or 0
    return {"documents": len(rows), "with_replacement_character": n_replaced}


def _rows(piece: Piece) -> pa.Table:
    rows = read_candidates(piece.folder, piece.batch_starts, piece.rows)
    columns = [_hex(rows["id"]), pa.repeat(piece.source, len(rows)), rows["text"], rows["n_bytes"]]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _hex(ids: pa.ChunkedArray) -> pa.Array:
    """Ids of 32 bytes as 64 hex digits."""
    ids = ids.combine_chunks()
    data = b"".join(ids.to_pylist()).hex().encode()
    offsets = np.arange(len(ids) + 1, dtype=np.int32) * 64
    return pa.Array.from_buffers(pa.string(), len(ids), [None, pa.py_buffer(offsets), pa.py_buffer(data)])

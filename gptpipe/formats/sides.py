"""Which side of the split a document is on: a pure function of (document id, seed)."""

from binascii import unhexlify
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.base.hashing import GAMMA, mix64

Side = Literal["train", "val", "test"]
SIDES: tuple[Side, ...] = get_args(Side)


class Fractions(NamedTuple):
    """Shares of the documents that are held out, by number."""

    val: float
    test: float


def sides_of(document_ids: Sequence[str], fractions: Fractions, seed: int) -> npt.NDArray[np.intp]:
    """The index in SIDES of each document.

    Each document has a position in [0, 1], which depends on its id and the seed. Test takes the lowest
    positions and val the highest, so a larger fraction of one takes documents from train only, never from the
    other. An id is a digest, so its first 8 bytes are uniformly distributed; SplitMix64 permutes them with the
    seed.
    """
    return _sides_of_digests(bytes.fromhex("".join(document_ids)), fractions, seed)


def sides_of_column(ids: pa.StringArray, fractions: Fractions, seed: int) -> npt.NDArray[np.intp]:
    """As `sides_of`, ten times faster, for a column of ids of this project's own files."""
    _, offsets, digits = ids.buffers()
    bounds = np.frombuffer(offsets, np.int32)[ids.offset : ids.offset + len(ids) + 1]
    return _sides_of_digests(unhexlify(memoryview(digits)[bounds[0] : bounds[-1]]), fractions, seed)


def _sides_of_digests(digests: bytes, fractions: Fractions, seed: int) -> npt.NDArray[np.intp]:
    first_bytes = np.frombuffer(digests, ">u8")[::4].astype(np.uint64)
    position = mix64(first_bytes + np.uint64((seed + 1) * GAMMA % 2**64)) / 2.0**64
    side = np.where(position > 1 - fractions.val, SIDES.index("val"), SIDES.index("train"))
    return np.where(position < fractions.test, SIDES.index("test"), side)

"""Which side of the split a document is on: a pure function of (document id, seed)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from gptpipe.base.hashing import GAMMA, mix64

Side = Literal["train", "val", "test"]
SIDES: tuple[Side, ...] = get_args(Side)


class Fractions(NamedTuple):
    """Shares of the documents that are held out, by number."""

    val: float
    test: float


def sides_of(document_ids: Sequence[str], fractions: Fractions, seed: int) -> npt.NDArray[np.intp]:
    """The index in SIDES of each document.

    Each document has a position in [0, 1], which depends on its id and the seed. Test takes the lowest positions and
    val the highest, so a larger fraction of one takes documents from train only, never from the other. An id is a
    digest, so its first 8 bytes are uniformly distributed; SplitMix64 permutes them with the seed.
    """
    first_bytes = np.frombuffer(bytes.fromhex("".join(document_ids)), ">u8")[::4].astype(np.uint64)
    position = mix64(first_bytes + np.uint64((seed + 1) * GAMMA % 2**64)) / 2.0**64
    side = np.where(position > 1 - fractions.val, SIDES.index("val"), SIDES.index("train"))
    return np.where(position < fractions.test, SIDES.index("test"), side)

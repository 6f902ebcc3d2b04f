"""Which side of the split a document is on: a pure function of (document id, seed)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

Side = Literal["train", "val", "test"]
SIDES: tuple[Side, ...] = get_args(Side)


class Fractions(NamedTuple):
    """Fractions of the documents, by count, that go to val and test."""

    val: float
    test: float


def sides_of(document_ids: Sequence[str], fractions: Fractions, seed: int) -> npt.NDArray[np.intp]:
    """The side of each document, as an index into SIDES.

    A larger `val` moves documents from train to val and leaves test unchanged; the same holds for `test`. An id
    is a digest, so its first 8 bytes are uniformly distributed. SplitMix64 (Steele, Lea, Flood, 2014) permutes
    them differently for each seed.
    """
    x = np.frombuffer(bytes.fromhex("".join(document_ids)), ">u8")[::4].astype(np.uint64)
    x += np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    position = (x ^ x >> np.uint64(31)) / 2.0**64  # in [0, 1]
    val_or_train = np.where(position > 1 - fractions.val, SIDES.index("val"), SIDES.index("train"))
    return np.where(position < fractions.test, SIDES.index("test"), val_or_train)

"""Which side of the split a document is on: a pure function of (document id, seed)."""

import hashlib
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from gptpipe.config import SplitParams

Side = Literal["train", "val", "test"]
SIDES: tuple[Side, ...] = get_args(Side)


def side_of(document_id: str, params: SplitParams, seed: int) -> Side:
    """The document's side."""
    return SIDES[int(sides_of([document_id], params, seed)[0])]


def sides_of(document_ids: Iterable[str], params: SplitParams, seed: int) -> npt.NDArray[np.intp]:
    """Places in SIDES of many documents. More validation takes documents from train only, never from test, and the
    reverse."""
    digests = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest() for name in document_ids]
    position = np.frombuffer(b"".join(digests), ">u8") / 2.0**64  # in [0, 1]
    found = np.where(position > 1 - params.val_fraction, SIDES.index("val"), SIDES.index("train"))
    return np.where(position < params.test_fraction, SIDES.index("test"), found)

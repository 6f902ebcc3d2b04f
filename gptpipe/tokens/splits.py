"""Which side of the split a document is on: a pure function of (document id, seed)."""

import hashlib
from typing import Literal, get_args

from gptpipe.config import SplitParams

Side = Literal["train", "val", "test"]
SIDES: tuple[Side, ...] = get_args(Side)


def side_of(document_id: str, params: SplitParams, seed: int) -> Side:
    """The document's side. More validation takes documents from train only, never from test, and the reverse."""
    digest = hashlib.blake2b(f"{seed}:{document_id}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64  # in [0, 1]
    if position < params.test_fraction:
        return "test"
    return "val" if position > 1 - params.val_fraction else "train"

"""What the model's bits per byte are measured against: two predictors that need no training worth the name."""

import lzma
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gptpipe.tokens.splits import Side
from gptpipe.tokens.streams import Stream
from gptpipe.tokens.tokenizer import Tokenizer

_CHUNK = 1 << 20  # tokens counted or decoded at once
_XZ_WINDOW = 64 << 20  # bytes that `xz -9` can look back


def unigram_bits_per_byte(train: Stream, held_out: Stream, vocab_size: int) -> float:
    """Bits per byte of a model that knows only how frequent each token of the train split is, with add-one smoothing.

    Scores the same tokens as the model does: all but the first.
    """
    counts = np.ones(vocab_size)
    for start in range(0, len(train.tokens), _CHUNK):
        counts += np.bincount(train.tokens[start : start + _CHUNK], minlength=vocab_size)
    nats = np.log(counts.sum()) - np.log(counts)
    total = sum(
        float(nats[held_out.tokens[start : start + _CHUNK]].sum()) for start in range(1, len(held_out.tokens), _CHUNK)
    )
    return total / math.log(2) / held_out.n_bytes


def xz_bits_per_byte(train: Stream, held_out: Mapping[Side, Stream], tokenizer: Tokenizer) -> dict[Side, float]:
    """Bits per byte that `xz -9e` needs for each held-out text behind the training text.

    The size of both together less that of the training text alone. Of the training text the last 64 MB, for xz looks
    no further back.
    """
    n_train = min(len(train.tokens), max(1, int(_XZ_WINDOW * len(train.tokens) / max(1, train.n_bytes))))
    seen = train.tokens[-n_train:]
    alone = _compressed_size([seen], tokenizer)
    return {
        side: 8 * (_compressed_size([seen, stream.tokens], tokenizer) - alone) / stream.n_bytes
        for side, stream in held_out.items()
    }


def _compressed_size(parts: list[npt.NDArray[np.unsignedinteger]], tokenizer: Tokenizer) -> int:
    """Bytes of the parts' text, one after the other, under `xz -9e`; a line feed closes each document."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = 0
    for tokens in parts:
        for start in range(0, len(tokens), _CHUNK):
            ids = tokens[start : start + _CHUNK].tolist()
            text = b"".join(
                b"\n" if i == tokenizer.end_of_text else tokenizer.encoding.decode_single_token_bytes(i) for i in ids
            )
            size += len(compressor.compress(text))
    return size + len(compressor.flush())

"""What the model's bits per byte are measured against: two predictors that need no training worth the name."""

import lzma
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from gptpipe.formats.sides import Side
from gptpipe.formats.streams import Stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.shell.environment import n_workers

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
    no further back. One thread for each text: xz works without the interpreter's lock.
    """
    n_train = min(len(train.tokens), max(1, int(_XZ_WINDOW * len(train.tokens) / max(1, train.n_bytes))))
    seen = b"".join(_text(train.tokens[-n_train:], tokenizer))
    behind = [_text(train.tokens[:0], tokenizer), *(_text(stream.tokens, tokenizer) for stream in held_out.values())]
    with ThreadPoolExecutor(n_workers()) as threads:
        alone, *together = threads.map(lambda text: _compressed_size(seen, text), behind)
    return {
        side: 8 * (size - alone) / stream.n_bytes
        for (side, stream), size in zip(held_out.items(), together, strict=True)
    }


def _text(tokens: npt.NDArray[np.unsignedinteger], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The text of a stream piece by piece; a line feed closes each document."""
    spelled = {i: token for token, i in tokenizer.ranks.items()} | {tokenizer.end_of_text: b"\n"}
    for start in range(0, len(tokens), _CHUNK):
        yield b"".join(map(spelled.__getitem__, tokens[start : start + _CHUNK].tolist()))


def _compressed_size(before: bytes, text: Iterable[bytes]) -> int:
    """Bytes of a text behind another one, under `xz -9e`."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = len(compressor.compress(before)) + sum(len(compressor.compress(piece)) for piece in text)
    return size + len(compressor.flush())

"""Reference points for the model's bits per byte: a unigram model and the compressor xz."""

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


def reference_bits_per_byte(
    train: Stream, held_out: Mapping[Side, Stream], tokenizer: Tokenizer
) -> dict[Side, dict[str, float]]:
    """Bits per byte of both reference points for each held-out side."""
    xz = xz_bits_per_byte(train, held_out, tokenizer)
    return {
        side: {"unigram": unigram_bits_per_byte(train, stream, tokenizer.vocab_size), "xz": xz[side]}
        for side, stream in held_out.items()
    }


def unigram_bits_per_byte(train: Stream, held_out: Stream, vocab_size: int) -> float:
    """Bits per byte of a model that knows only the frequency of each token in `train`, with add-one smoothing.

    It scores the same tokens as the network: all but the first.
    """
    counts = np.ones(vocab_size)
    for start in range(0, len(train.tokens), _CHUNK):
        counts += np.bincount(train.tokens[start : start + _CHUNK], minlength=vocab_size)
    nats = np.log(counts.sum()) - np.log(counts)
    total = sum(
        float(nats[held_out.tokens[start : start + _CHUNK]].sum())
        for start in range(1, len(held_out.tokens), _CHUNK)
    )
    return total / math.log(2) / held_out.n_bytes


def xz_bits_per_byte(train: Stream, held_out: Mapping[Side, Stream], tokenizer: Tokenizer) -> dict[Side, float]:
    """Bits per byte that `xz -9e` needs for each held-out text if it has compressed the training text before.

    This is the compressed size of both together minus that of the training text. Only the last 64 MB of the
    training text are used, because xz looks no further back. Each text has its own thread; xz releases the
    interpreter's lock.
    """
    tokens_per_byte = len(train.tokens) / max(1, train.n_bytes)
    n_train = min(len(train.tokens), max(1, int(_XZ_WINDOW * tokens_per_byte)))
    train_text = b"".join(_text(train.tokens[-n_train:], tokenizer))
    texts = [_text(stream.tokens, tokenizer) for stream in held_out.values()]
    with ThreadPoolExecutor(n_workers()) as threads:
        size_of_train, *sizes = threads.map(lambda text: _compressed_size(train_text, text), [iter(()), *texts])
    return {
        side: 8 * (size - size_of_train) / stream.n_bytes
        for (side, stream), size in zip(held_out.items(), sizes, strict=True)
    }


def _text(tokens: npt.NDArray[np.unsignedinteger], tokenizer: Tokenizer) -> Iterator[bytes]:
    """Yield the text of a stream in pieces; each document ends with a line feed."""
    bytes_of_id = {i: token for token, i in tokenizer.ranks.items()} | {tokenizer.end_of_text: b"\n"}
    for start in range(0, len(tokens), _CHUNK):
        yield b"".join(map(bytes_of_id.__getitem__, tokens[start : start + _CHUNK].tolist()))


def _compressed_size(before: bytes, text: Iterable[bytes]) -> int:
    """Compressed size in bytes of `before` followed by `text`, under `xz -9e`."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = len(compressor.compress(before)) + sum(len(compressor.compress(piece)) for piece in text)
    return size + len(compressor.flush())

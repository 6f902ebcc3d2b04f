"""Reference points for the model's bits per byte: a unigram model and the compressors xz and PPMd."""

import lzma
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyppmd

from gptpipe.formats.sides import Side
from gptpipe.formats.streams import Stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.shell.environment import n_workers

_CHUNK = 1 << 20  # tokens counted or decoded at once
_XZ_WINDOW = 64 << 20  # bytes that `xz -9` can look back
_PPMD_ORDER = 16  # bytes of context
_PPMD_WINDOW = 8 << 20  # bytes of training text, and of each held-out text
_PPMD_MEMORY = 512 << 20  # bytes; PPMd of order 16 needs about 25 for each byte of text


def reference_bits_per_byte(
    train: Stream, held_out: Mapping[Side, Stream], tokenizer: Tokenizer
) -> dict[Side, dict[str, float]]:
    """Bits per byte of the reference points for each held-out side."""
    xz = xz_bits_per_byte(train, held_out, tokenizer)
    ppmd = ppmd_bits_per_byte(train, held_out, tokenizer)
    return {
        side: {
            "unigram": unigram_bits_per_byte(train, stream, tokenizer.vocab_size),
            "xz": xz[side],
            "ppmd": ppmd[side],
        }
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
    train_text = b"".join(_text(_last_tokens(train, _XZ_WINDOW), tokenizer))
    texts = [_text(stream.tokens, tokenizer) for stream in held_out.values()]
    with ThreadPoolExecutor(n_workers()) as threads:
        size_of_train, *sizes = threads.map(lambda text: _xz_size(train_text, text), [iter(()), *texts])
    return {
        side: 8 * (size - size_of_train) / stream.n_bytes
        for (side, stream), size in zip(held_out.items(), sizes, strict=True)
    }


def ppmd_bits_per_byte(
    train: Stream, held_out: Mapping[Side, Stream], tokenizer: Tokenizer
) -> dict[Side, float]:
    """Like `xz_bits_per_byte`, for PPMd (variant H, order 16), which mixes the contexts of each byte.

    C. Shkarin, "PPM: one step to practicality", DCC 2002. It uses the last 8 MB of the training text and the
    first 8 MB of each held-out text, so its memory is bounded.
    """
    train_text = b"".join(_text(_last_tokens(train, _PPMD_WINDOW), tokenizer))
    texts = [_first_bytes(_text(stream.tokens, tokenizer), _PPMD_WINDOW) for stream in held_out.values()]
    with ThreadPoolExecutor(n_workers()) as threads:
        size_of_train, *sizes = threads.map(lambda text: _ppmd_size(train_text, text), [b"", *texts])
    return {
        side: 8 * (size - size_of_train) / min(len(text), held_out[side].n_bytes)
        for side, text, size in zip(held_out, texts, sizes, strict=True)
    }


def _last_tokens(stream: Stream, n_bytes: int) -> npt.NDArray[np.unsignedinteger]:
    """The tokens at the end of a stream that have about so many bytes; at least one."""
    tokens_per_byte = len(stream.tokens) / max(1, stream.n_bytes)
    return stream.tokens[-max(1, int(n_bytes * tokens_per_byte)) :]


def _first_bytes(text: Iterable[bytes], n_bytes: int) -> bytes:
    start = bytearray()
    for piece in text:
        start += piece[: n_bytes - len(start)]
        if len(start) == n_bytes:
            break
    return bytes(start)


def _text(tokens: npt.NDArray[np.unsignedinteger], tokenizer: Tokenizer) -> Iterator[bytes]:
    """Yield the text of a stream in pieces; each document ends with a line feed."""
    bytes_of_id = {i: token for token, i in tokenizer.ranks.items()} | {tokenizer.end_of_text: b"\n"}
    for start in range(0, len(tokens), _CHUNK):
        yield b"".join(map(bytes_of_id.__getitem__, tokens[start : start + _CHUNK].tolist()))


def _xz_size(before: bytes, text: Iterable[bytes]) -> int:
    """Compressed size in bytes of `before` followed by `text`, under `xz -9e`."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = len(compressor.compress(before)) + sum(len(compressor.compress(piece)) for piece in text)
    return size + len(compressor.flush())


def _ppmd_size(before: bytes, text: bytes) -> int:
    """Compressed size in bytes of `before` followed by `text`, under PPMd."""
    encoder = pyppmd.Ppmd7Encoder(_PPMD_ORDER, _PPMD_MEMORY)
    return len(encoder.encode(before)) + len(encoder.encode(text)) + len(encoder.flush())

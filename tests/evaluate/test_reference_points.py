"""The reference points, compared with a calculation by hand, with `lzma` and with PPMd's own files."""

import lzma
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyppmd
import pytest

from gptpipe.evaluate import reference_points
from gptpipe.evaluate.reference_points import ppmd_bits_per_byte, unigram_bits_per_byte, xz_bits_per_byte
from gptpipe.formats.sides import Side
from gptpipe.formats.streams import Stream, open_stream
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer


def stream_of(tokens: list[int], n_bytes: int) -> Stream:
    return Stream(np.array(tokens, dtype=np.uint16), pd.DataFrame({"n_bytes": [n_bytes]}))


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_unigram_bits_per_byte_calculated_by_hand(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Training tokens 0, 0, 1 give probabilities 3/6, 2/6 and 1/6. The first held-out token is not scored."""
    monkeypatch.setattr(reference_points, "_CHUNK", chunk)
    bits = -(math.log2(3 / 6) + math.log2(2 / 6) + math.log2(1 / 6))
    bits_per_byte = unigram_bits_per_byte(stream_of([0, 0, 1], 9), stream_of([2, 0, 1, 2], 10), 3)
    assert bits_per_byte == pytest.approx(bits / 10)


def text_of(stream: Stream, tokenizer: Tokenizer) -> bytes:
    """The documents of a stream, each with a line feed at its end."""
    ids = stream.tokens.tolist()
    ends = [i + 1 for i, token in enumerate(ids) if token == tokenizer.end_of_text]
    return b"".join(
        tokenizer.decode_bytes(ids[a:b]) + b"\n" for a, b in zip([0, *ends[:-1]], ends, strict=True)
    )


def xz_size(content: bytes) -> int:
    return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def ppmd_size(content: bytes) -> int:
    return len(pyppmd.compress(content, max_order=16, mem_size=1 << 24, variant="H"))


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    ("size", "bits_per_byte_of"), [(xz_size, xz_bits_per_byte), (ppmd_size, ppmd_bits_per_byte)]
)
def test_a_compressors_bits_per_byte_are_the_growth_of_the_archive(
    toy_split: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    size: Callable[[bytes], int],
    bits_per_byte_of: Callable[..., dict[Side, float]],
) -> None:
    monkeypatch.setattr(reference_points, "_CHUNK", chunk)
    tokenizer = Tokenizer.load(toy_split / TOKENIZER)
    train, val = open_stream(toy_split, "train"), open_stream(toy_split, "val")
    train_text, val_text = text_of(train, tokenizer), text_of(val, tokenizer)
    expected = 8 * (size(train_text + val_text) - size(train_text)) / val.n_bytes
    assert 0 < expected < 8
    bits_per_byte = bits_per_byte_of(train, {"val": val, "test": train}, tokenizer)
    assert bits_per_byte["val"] == pytest.approx(expected)
    assert bits_per_byte["test"] < 0.2 < expected  # text seen before costs almost nothing


def test_ppmd_reads_a_limited_part_of_each_text(toy_split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the training text, and the start of the held-out text."""
    monkeypatch.setattr(reference_points, "_PPMD_WINDOW", 500)
    tokenizer = Tokenizer.load(toy_split / TOKENIZER)
    train, val = open_stream(toy_split, "train"), open_stream(toy_split, "val")
    n_tokens = int(500 * len(train.tokens) / train.n_bytes)
    end = text_of(Stream(train.tokens[-n_tokens:], train.documents), tokenizer)
    start = text_of(val, tokenizer)[:500]
    expected = 8 * (ppmd_size(end + start) - ppmd_size(end)) / 500
    assert ppmd_bits_per_byte(train, {"val": val}, tokenizer)["val"] == pytest.approx(expected)

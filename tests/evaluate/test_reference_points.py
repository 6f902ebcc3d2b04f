"""The reference points, compared with a calculation by hand and with `lzma`."""

import lzma
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gptpipe.evaluate import reference_points
from gptpipe.evaluate.reference_points import unigram_bits_per_byte, xz_bits_per_byte
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


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_xz_bits_per_byte_are_the_growth_of_the_archive(
    toy_split: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(reference_points, "_CHUNK", chunk)
    tokenizer = Tokenizer.load(toy_split / TOKENIZER)
    train, val = open_stream(toy_split, "train"), open_stream(toy_split, "val")

    def text(stream: Stream) -> bytes:
        ids = stream.tokens.tolist()
        ends = [i + 1 for i, token in enumerate(ids) if token == tokenizer.end_of_text]
        return b"".join(
            tokenizer.decode_bytes(ids[a:b]) + b"\n" for a, b in zip([0, *ends[:-1]], ends, strict=True)
        )

    def size(content: bytes) -> int:
        return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    expected = 8 * (size(text(train) + text(val)) - size(text(train))) / val.n_bytes
    assert 0 < expected < 8
    bits_per_byte = xz_bits_per_byte(train, {"val": val, "test": train}, tokenizer)
    assert bits_per_byte["val"] == pytest.approx(expected)
    assert bits_per_byte["test"] < 0.2 < expected  # text that xz has seen costs almost nothing

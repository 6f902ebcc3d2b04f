"""Any Unicode text survives cleaning, encoding and decoding."""

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sections import SHIPPED, filters

from gptpipe.collect.cleaning import clean, cut
from gptpipe.collect.params import CollectParams
from gptpipe.collect.texts import Rejected
from gptpipe.formats.tokenizer import END_OF_TEXT, Tokenizer
from gptpipe.tokenize.tokenizers import named_tokenizer, train_tokenizer

PARAMS = CollectParams.model_validate({**dict(SHIPPED.collect), "filters": filters(), "min_document_bytes": 1})
# Pieces that cleaning, NFC or the pattern of a tokenizer treats in a special way.
PIECES = (
    *(
        "\n",
        "\r\n",
        "\r",
        "\t",
        " ",
        "  \n",
        "\n\n\n",
        "\0",
        "\x01",
        "\x7f",
        "\x85",
        "\x9f",
        "\ufeff",
        "\u2028",
        "\xa0",
    ),
    *(
        "e\u0301",
        "\u00e9",
        "\u212b",
        "\u0344",
        "\u1100\u1161\u11a8",
        "\uac01",
        "\u0f73",
        "\U0001f468\u200d\U0001f469",
    ),
    *(
        END_OF_TEXT,
        "<|endof",
        "a",
        "1234567",
        "don't",
        "\u0e01\u0e33",
        "\u0645\u0631\u062d\u0628\u0627",
        "\ud800",
        "\udfff",
    ),
)
pieces = st.sampled_from(PIECES)
repeated = st.tuples(pieces, st.sampled_from([9, 999, 1000, 1001, 1100])).map(lambda pair: pair[0] * pair[1])
parts = st.one_of(st.text(st.characters(), max_size=20), pieces, pieces, repeated)
texts = st.lists(parts, max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    trained = train_tokenizer(["the cat sat on the mat, the dog sat on the log, naïve café"] * 3, 280)
    return [trained, named_tokenizer("gpt2")]


def has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def visible(text: str) -> str:
    """The part of a text that cleaning must keep: decomposed, without white space and control characters.

    Byte order marks and combining marks are left out too: cleaning removes byte order marks at the start, and
    combining marks after 1,000 in a row.
    """
    return "".join(
        c
        for c in unicodedata.normalize("NFD", text)
        if not (c.isspace() or c == "\ufeff" or unicodedata.category(c) == "Cc" or unicodedata.combining(c))
    )


@given(st.lists(texts, min_size=1, max_size=4))
@example(["\ufeff\ufeffa", "\x01\ufeffa", "\n\ufeffa"])
@example(["\u0344" * 1001 + "a", "a" + "\xa0" * 999 + " " + "\xa0" * 5, "a" + "\xa0" * 999 + "\n" + "\xa0" * 5])
def test_cleaning_changes_only_what_it_documents(batch: list[str]) -> None:
    cleaned = clean(batch, PARAMS)
    assert len(cleaned) == len(batch)
    for text, result in zip(batch, cleaned, strict=True):
        if isinstance(result, Rejected):
            assert result.reason == ("lone_surrogates" if has_surrogate(text) else "empty")
            assert has_surrogate(text) or not visible(text).strip("\ufeff")
            continue
        assert visible(result) == visible(text)
        assert unicodedata.is_normalized("NFC", result)
        assert not result.startswith(("\ufeff", "\n"))
        assert not result.endswith(("\n", " ", "\t"))
        assert not any(line.endswith((" ", "\t")) for line in result.split("\n"))
        assert all(c in "\t\n" or unicodedata.category(c) != "Cc" for c in result)
        assert clean([result], PARAMS) == [result]  # a second cleaning changes nothing


@given(st.lists(texts, min_size=1, max_size=4))
def test_the_cleaning_of_a_text_does_not_depend_on_its_batch(batch: list[str]) -> None:
    for text, result in zip(batch, clean(batch, PARAMS), strict=True):
        (alone,) = clean([text], PARAMS)
        assert (alone == result) or (isinstance(alone, Rejected) and isinstance(result, Rejected))


@given(st.lists(texts, min_size=1, max_size=4))
def test_decoding_restores_the_encoded_text(tokenizers: list[Tokenizer], batch: list[str]) -> None:
    kept = [text for text in clean(batch, PARAMS) if isinstance(text, str)]
    for tokenizer in tokenizers:
        for text in kept:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.end_of_text not in ids  # text that contains its spelling stays ordinary text
        together = tokenizer.encode_documents(kept)
        ends = np.flatnonzero(together == tokenizer.end_of_text)
        assert len(ends) == len(kept)
        documents = np.split(together, ends[:-1] + 1) if kept else []
        assert [tokenizer.decode(ids[:-1].tolist()) for ids in documents] == kept


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_token_ids_decode(tokenizers: list[Tokenizer], ids: list[int]) -> None:
    """Arbitrary ids may split characters, but decoding still returns text."""
    for tokenizer in tokenizers:
        tokenizer.decode(ids).encode()


@given(texts, st.integers(4, 300))
def test_cutting_loses_nothing_and_respects_the_limit(text: str, max_bytes: int) -> None:
    parts = cut(text, max_bytes)
    assert "".join(parts) == text
    for part in parts:
        assert 0 < len(part.encode(errors="surrogatepass")) <= max_bytes

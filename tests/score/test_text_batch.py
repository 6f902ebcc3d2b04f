"""Text in pieces: whole characters, stop strings, ends, log probabilities, and several texts at once."""

from collections.abc import Sequence

import pytest
import tiny

from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.generate import Sampling, Token
from gptpipe.score.text_batch import (
    Piece,
    TextBatch,
    TextRequest,
    TextSequence,
    continue_text,
    continue_texts,
    prompt_tokens,
    text_before_stop,
)
from gptpipe.tokenize.tokenizers import train_tokenizer

BYTES = train_tokenizer(["ab " * 50], 257)  # a token for every byte, and the end of text


def pieces_of(ids: Sequence[int], stop: Sequence[str] = (), tokenizer: Tokenizer = BYTES) -> list[Piece]:
    """The pieces of a text with these tokens, up to its end."""
    request = TextRequest(prompt=[0], max_new_tokens=len(ids), sampling=Sampling(), stop=stop)
    text = TextSequence(tokenizer, request)
    pieces = []
    for i in ids:
        pieces.append(text.add(Token(i)))
        if pieces[-1].finish_reason is not None:
            break
    return pieces


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_character_may_span_several_tokens() -> None:
    ids = BYTES.encode("é猫🙂")
    assert len(ids) == 9
    pieces = pieces_of(ids)
    assert [piece.text for piece in pieces if piece.text] == ["é", "猫", "🙂"]
    assert [piece.finish_reason for piece in pieces] == [None] * 8 + ["length"]


def test_a_text_stops_at_the_end_of_the_document() -> None:
    pieces = pieces_of([*BYTES.encode("ab"), BYTES.end_of_text, *BYTES.encode("cd")])
    assert joined(pieces) == "ab"
    assert pieces[-1] == Piece("", [], "stop")


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    assert joined(pieces_of(BYTES.encode("猫")[:2])) == "\N{REPLACEMENT CHARACTER}"
    assert joined(pieces_of([*BYTES.encode("猫")[:2], BYTES.end_of_text])) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ([], "one two\n\nthree", "length"),
        (["\n\n"], "one two", "stop"),
        (["zzz", "two"], "one ", "stop"),
        (["two", "one"], "", "stop"),
        (["ee", "eex"], "one two\n\nthr", "stop"),
        (["threes"], "one two\n\nthree", "length"),  # held back, and given at the end
        (["\n\n\n"], "one two\n\nthree", "length"),
    ],
)
def test_a_text_ends_before_the_first_stop_string(stop: list[str], text: str, reason: str) -> None:
    pieces = pieces_of(BYTES.encode("one two\n\nthree"), stop)
    assert joined(pieces) == text
    assert pieces[-1].finish_reason == reason


def test_a_piece_is_given_as_soon_as_no_stop_string_can_begin_in_it() -> None:
    assert [piece.text for piece in pieces_of(BYTES.encode("a\nb\n\nc"), ["\n\n"])] == ["a", "", "\nb", "", ""]
    assert text_before_stop("xaab", 0, ["abc", "aabc"]) == (1, False)
    assert text_before_stop("ab", 1, ["abc"]) == (2, False)  # it would begin before the start


def test_tokens_come_with_the_text_that_they_are_from() -> None:
    """Offsets count characters. What comes after a stop string is dropped."""
    pieces = pieces_of(BYTES.encode("é\n\nx"), ["\n\n"])
    tokens = [(token.token.id, token.offset) for piece in pieces for token in piece.tokens]
    assert tokens == [(i, 0) for i in BYTES.encode("é")]
    whole = [token.offset for piece in pieces_of(BYTES.encode("é\nx"), ["\n\n"]) for token in piece.tokens]
    assert whole == [0, 0, 1, 2]


@pytest.mark.parametrize("prompt", ["", "x", "longer than the context of sixteen tokens"])
def test_any_prompt_can_be_continued(prompt: str) -> None:
    model = tiny.network(257)
    texts = ["".join(continue_text(model, BYTES, prompt, 20, Sampling(seed=1))) for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0]


def test_many_prompts_get_the_texts_that_they_get_alone() -> None:
    """More than are continued at once, in order."""
    model, sampling = tiny.network(257), Sampling(seed=3)
    prompts = ["", "x", "longer than the context of sixteen tokens", *("ab" * n for n in range(1, 20))]
    alone = ["".join(continue_text(model, BYTES, prompt, 12, sampling, ["q"])) for prompt in prompts]
    assert continue_texts(model, BYTES, prompts, 12, sampling, ["q"]) == alone
    assert len(set(alone)) > 10
    assert continue_texts(model, BYTES, [], 12, sampling) == []


def test_a_text_that_is_removed_does_not_disturb_the_others() -> None:
    model = tiny.network(257)
    alone = "".join(continue_text(model, BYTES, "b", 9, Sampling()))
    batch = TextBatch(model, BYTES, 3, 20)
    texts = [
        batch.add(TextRequest(prompt=prompt_tokens(BYTES, prompt), max_new_tokens=9, sampling=Sampling()))
        for prompt in ("a", "c", "b")
    ]
    pieces: list[Piece] = []
    for step in range(9):
        if step == 4:
            batch.remove(texts[0])
        pieces += [piece for text, piece in batch.step() if text is texts[2]]
    assert joined(pieces) == alone
    assert len(batch) == 0

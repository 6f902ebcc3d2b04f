"""Text sampled from the model, and its similarity to the real text."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.model.generate import Sampling
from gptpipe.score import continuations
from gptpipe.score.continuations import (
    Continuation,
    announce_cut,
    continue_documents,
    continue_text,
    overlap_scores,
    until_stop,
)
from gptpipe.tokenize.tokenizers import train_tokenizer

BYTES = train_tokenizer(["ab " * 50], 257)  # a token for every byte, and the end of text


def scripted(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Let the model generate exactly these tokens."""

    def generate(*_: object) -> Iterator[torch.Tensor]:
        yield from (torch.tensor([i]) for i in ids)

    monkeypatch.setattr(continuations, "generate", generate)


def test_a_character_may_span_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = BYTES.encode("é猫🙂")
    assert len(ids) == 9
    scripted(monkeypatch, ids)
    pieces = list(continue_text(tiny.network(257), BYTES, "x", 9, Sampling()))
    assert [piece for piece in pieces if piece] == ["é", "猫", "🙂"]


def test_a_continuation_stops_at_the_end_of_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [*BYTES.encode("ab"), BYTES.end_of_text, *BYTES.encode("cd")])
    assert "".join(continue_text(tiny.network(257), BYTES, "x", 9, Sampling())) == "ab"


def test_an_incomplete_character_at_the_end_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, BYTES.encode("猫")[:2])
    assert "".join(continue_text(tiny.network(257), BYTES, "x", 9, Sampling())) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ([], "one two\n\nthree"),
        (["\n\n"], "one two"),
        (["zzz", "two"], "one "),
        (["two", "one"], ""),
        (["ee", "eex"], "one two\n\nthr"),
        (["threes"], "one two\n\nthree"),  # held back, and given at the end
        (["\n\n\n"], "one two\n\nthree"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5, 99])
def test_text_ends_before_the_first_stop_string(stop: list[str], text: str, size: int) -> None:
    """However the text is divided into pieces."""
    whole = "one two\n\nthree"
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    assert "".join(until_stop(pieces, stop)) == text


def test_a_piece_is_given_as_soon_as_no_stop_string_can_begin_in_it() -> None:
    assert list(until_stop(["a\n", "b", "\n", "\n", "c"], ["\n\n"])) == ["a", "\nb", "", ""]


def test_a_continuation_stops_before_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, BYTES.encode("é. Next"))
    assert "".join(continue_text(tiny.network(257), BYTES, "x", 9, Sampling(), [". "])) == "é"


@pytest.mark.parametrize("prompt", ["", "x", "longer than the context of sixteen tokens"])
def test_any_prompt_can_be_continued(prompt: str) -> None:
    model = tiny.network(257)
    texts = ["".join(continue_text(model, BYTES, prompt, 20, Sampling(seed=1))) for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0]


def test_a_prompt_longer_than_the_context_is_announced(
    toy_split: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.network(300)
    announce_cut(model, BYTES, "x" * 16, "it")
    tokenizer, stream = Tokenizer.load(toy_split / TOKENIZER), open_stream(toy_split, "test")
    continue_documents(model, tokenizer, stream, n_documents=1, n_tokens=16)
    assert capsys.readouterr().err == ""
    announce_cut(model, BYTES, "x" * 17, "it")
    continue_documents(model, tokenizer, stream, n_documents=1, n_tokens=17)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: it has 17 tokens, the context of the model has 16; only the last 16 are used"
    assert second.startswith("warning: evaluate.continuation_tokens: the start of each document has 17 tokens")


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_documents_are_continued_after_their_first_half(
    toy_split: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(continuations, "_BATCH", at_once)
    tokenizer, stream = Tokenizer.load(toy_split / TOKENIZER), open_stream(toy_split, "test")
    model = tiny.network(300)
    continued = continue_documents(model, tokenizer, stream, n_documents=3, n_tokens=5)
    long_enough = stream.documents[stream.documents["n_tokens"] > 10]
    assert len(continued) == 3
    for continuation, offset in zip(continued, long_enough["offset"], strict=False):
        ids = stream.tokens[offset : offset + 10].tolist()
        assert continuation.prompt == tokenizer.decode(ids[:5])
        assert continuation.reference == tokenizer.decode(ids[5:])
        alone = "".join(continue_text(model, tokenizer, continuation.prompt, 5, Sampling(temperature=0)))
        if tokenizer.encode(continuation.prompt) == ids[:5]:
            assert continuation.generated == alone


def test_without_long_documents_there_are_no_continuations(toy_split: Path) -> None:
    tokenizer, stream = Tokenizer.load(toy_split / TOKENIZER), open_stream(toy_split, "test")
    continued = continue_documents(tiny.network(300), tokenizer, stream, 3, 10_000)
    assert continued == []
    assert overlap_scores(continued) == {}


def test_overlap_scores_of_equal_and_of_disjoint_texts() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    same = overlap_scores([Continuation("p", text, text)] * 2)
    assert same["bleu"] == pytest.approx(100)
    assert same["rouge_l"] == pytest.approx(1)
    assert same["rouge_l_standard_error"] == pytest.approx(0)
    disjoint = overlap_scores([Continuation("p", text, "seven wet oats went up hill past many old barns")])
    assert disjoint["bleu"] < 5
    assert disjoint["rouge_l"] == 0
    assert overlap_scores([Continuation("p", text, "")])["rouge_l"] == 0


def test_rouge_l_calculated_by_hand() -> None:
    """Common subsequence `the dog` of 3 and 4 words: precision 2/4, recall 2/3, F1 4/7; and a perfect one."""
    pair = [Continuation("p", "the big dog", "the dog was here"), Continuation("p", "yes it is", "yes it is")]
    scores = overlap_scores(pair)
    assert scores["rouge_l"] == pytest.approx((4 / 7 + 1) / 2)
    # The error is sqrt(2) * half the gap / sqrt(2).
    assert scores["rouge_l_standard_error"] == pytest.approx((1 - 4 / 7) / 2)
    assert scores["n_documents"] == 2

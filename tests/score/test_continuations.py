"""Text sampled from the model, and its similarity to the real text."""

from pathlib import Path

import pytest
import tiny

from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.model.generate import Sampling
from gptpipe.score import continuations
from gptpipe.score.continuations import Continuation, announce_cut, continue_documents, overlap_scores
from gptpipe.score.text_batch import continue_text
from gptpipe.tokenize.tokenizers import train_tokenizer

BYTES = train_tokenizer(["ab " * 50], 257)  # a token for every byte, and the end of text


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

"""Sentences of held-out documents, in scripts with and without spaces, and the evaluations that use them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from gptpipe.evaluate.cloze import cloze
from gptpipe.evaluate.minimal_pairs import minimal_pairs, swap_words
from gptpipe.evaluate.sentences import Sentence, sentences_of
from gptpipe.formats.streams import Stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.gpt import GPT
from gptpipe.score.scoring import Scoring
from gptpipe.tokenize.tokenizers import train_tokenizer

ENGLISH = "The old cat likes a red tree. Was it near? A dog, naïve and blue, sees the old cat near a tree."
CHINESE = "天地玄黄宇宙洪荒。日月盈昃辰宿列张。"
THAI = "มนุษย์ทั้งหลาย เกิดมามีอิสระ"


def stream_of(texts: Sequence[str], tokenizer: Tokenizer, ids: Sequence[str] | None = None) -> Stream:
    tokens = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
    lengths = [len(text) for text in tokens]
    table = {
        "id": ids or [f"{i:064x}" for i in range(len(texts))],
        "offset": np.cumsum([0, *lengths])[:-1],
        "n_tokens": lengths,
    }
    return Stream(np.concatenate(tokens).astype(np.uint16), pd.DataFrame(table))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([ENGLISH] * 3, 300)


def texts_of(sentences: list[Sentence]) -> list[str]:
    return [sentence.text[sentence.start : sentence.end] for sentence in sentences]


def words_of(sentence: Sentence) -> list[str]:
    return [sentence.text[word.start : word.end] for word in sentence.words]


def test_sentences_end_at_full_stops_and_empty_lines(tokenizer: Tokenizer) -> None:
    text = 'Two words. He said, "this is\nthe end of it." And v1.2 is what it was\n\nfive words make a heading'
    sentences = sentences_of(stream_of([text], tokenizer), tokenizer)
    assert texts_of(sentences) == [
        'He said, "this is\nthe end of it."',
        "And v1.2 is what it was",
        "five words make a heading",
    ]
    assert words_of(sentences[1]) == ["And", "v1", "2", "is", "what", "it", "was"]


def test_sentences_of_more_than_40_words_are_left_out(tokenizer: Tokenizer) -> None:
    texts = [" ".join(["cat"] * n) for n in (4, 5, 40, 41)]
    sentences = sentences_of(stream_of(texts, tokenizer), tokenizer)
    assert [len(sentence.words) for sentence in sentences] == [5, 40]


def test_documents_are_read_in_the_order_of_their_ids(tokenizer: Tokenizer) -> None:
    stream = stream_of(["a b c d e.", "f g h i j."], tokenizer, ids=["ff", "00"])
    assert [sentence.document for sentence in sentences_of(stream, tokenizer)] == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CHINESE, "天 地 玄 黄 宇 宙 洪 荒"),
        (THAI, "ม นุ ษ ย์ ทั้ ง ห ล า ย"),
        ("한국어는 띄어쓰기를 합니다 네 그래요.", "한국어는 띄어쓰기를 합니다 네 그래요"),
        ("नमस्ते क्\u200dया हाल है भाई।", "नमस्ते क्\u200dया हाल है भाई"),
        ("I don't know his mother-in-law.", "I don't know his mother-in-law"),
    ],
    ids=["Chinese", "Thai", "Korean", "Hindi", "English"],
)
def test_a_word_without_spaces_around_it_is_a_letter_with_its_marks(
    tokenizer: Tokenizer, text: str, words: str
) -> None:
    assert words_of(sentences_of(stream_of([text], tokenizer), tokenizer)[0]) == words.split()


def test_sentences_of_scripts_without_spaces(tokenizer: Tokenizer) -> None:
    sentences = sentences_of(stream_of([CHINESE, THAI], tokenizer), tokenizer)
    assert texts_of(sentences) == ["天地玄黄宇宙洪荒。", "日月盈昃辰宿列张。", *THAI.split()]


def test_two_different_words_are_swapped_and_the_first_stays(tokenizer: Tokenizer) -> None:
    sentence = sentences_of(stream_of(["The cat, the cat; a Cat!"], tokenizer), tokenizer)[0]
    swapped = {swap_words(sentence, np.random.default_rng(seed)) for seed in range(200)}
    assert swapped == {
        "The the, cat cat; a Cat!",
        "The a, the cat; cat Cat!",
        "The cat, cat the; a Cat!",
        "The cat, a cat; the Cat!",
        "The cat, Cat cat; a the!",
        "The cat, the a; cat Cat!",
        "The cat, the cat; Cat a!",
    }


class Ordered(GPT):
    """A network that finds the tokens of the text in `successors` certain, and all others alike."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        super().__init__(tiny.model_params(context_length=64, n_embd=32), tokenizer.vocab_size)
        ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
        self.table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
        self.table[ids[:-1], ids[1:]] = 20.0
        self.head = torch.nn.Identity()  # type: ignore[assignment]

    def hidden(self, tokens: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return self.table[tokens]


def test_a_model_that_knows_the_order_of_words_is_right_on_all_pairs(tokenizer: Tokenizer) -> None:
    text = "cat dog tree red blue old."
    sentences = sentences_of(stream_of([text, text, "Ok."], tokenizer), tokenizer)
    result = minimal_pairs(Ordered(tokenizer, text), tokenizer, sentences, Scoring(), seed=1)
    assert result == {"accuracy": 1.0, "accuracy_standard_error": 0.0, "n_pairs": 2, "n_documents": 2}
    untrained = GPT(tiny.model_params(context_length=64, tie_embeddings=False), tokenizer.vocab_size)
    guessed = minimal_pairs(untrained, tokenizer, sentences, Scoring(), seed=1)
    assert guessed["accuracy"] == 0.5  # the same tokens in another order are equally likely


def test_minimal_pairs_are_repeatable_and_fit_the_context(tokenizer: Tokenizer) -> None:
    sentences = sentences_of(stream_of([ENGLISH, ENGLISH[::-1]], tokenizer), tokenizer)
    model = tiny.network(tokenizer.vocab_size, context_length=24)
    results = [minimal_pairs(model, tokenizer, sentences, Scoring(), seed) for seed in (3, 3)]
    assert results[0] == results[1]
    assert 0 < results[0]["n_pairs"] < len(sentences)


def test_minimal_pairs_without_a_usable_sentence_have_a_reason(tokenizer: Tokenizer) -> None:
    for texts in (["Cat cat cat cat cat."], ["cat"], [ENGLISH]):
        sentences = sentences_of(stream_of(texts, tokenizer), tokenizer)
        model = tiny.network(tokenizer.vocab_size, context_length=4)
        result = minimal_pairs(model, tokenizer, sentences, Scoring(), seed=0)
        assert result["accuracy"] is None
        assert "fits into 4 tokens" in result["reason"]


def test_last_words_are_completed_greedily(tokenizer: Tokenizer) -> None:
    """Of the last words ` old` and ` tree`, the model knows the first, and gives all tokens alike otherwise."""
    known, unknown = "cat dog tree red blue old.", "was near sees likes a tree!"
    sentences = sentences_of(stream_of([known, unknown], tokenizer), tokenizer)
    result = cloze(Ordered(tokenizer, known), tokenizer, sentences, Scoring(), seed=0)
    n_tokens = len(tokenizer.encode(" tree"))
    assert result["accuracy"] == 0.5
    assert result["accuracy_standard_error"] == pytest.approx(0.5)  # of the values 0 and 1: sqrt(0.5 / 2)
    # A token of the unknown word costs ln(300) nats, unless the other sentence has it in the same place.
    assert 1 < result["perplexity"] <= 300 ** (n_tokens / 2) + 1e-3
    assert (result["n_passages"], result["n_documents"]) == (2, 2)


def test_the_perplexity_of_a_model_that_knows_nothing(tokenizer: Tokenizer) -> None:
    model = GPT(tiny.model_params(tie_embeddings=False), tokenizer.vocab_size)
    sentences = sentences_of(stream_of(["was near sees likes a tree!"], tokenizer), tokenizer)
    n_tokens = len(tokenizer.encode(" tree"))
    assert cloze(model, tokenizer, sentences, Scoring(), 0)["perplexity"] == pytest.approx(300**n_tokens)


@pytest.mark.parametrize("text", [CHINESE, THAI, "a b c d 天。", "a b c d (e)", "a b c d\ne", "one two"])
def test_cloze_without_a_last_word_after_a_space_has_a_reason(tokenizer: Tokenizer, text: str) -> None:
    sentences = sentences_of(stream_of([text], tokenizer), tokenizer)
    result = cloze(tiny.network(tokenizer.vocab_size), tokenizer, sentences, Scoring(), seed=0)
    assert result["accuracy"] is None
    assert result["perplexity"] is None
    assert "follows a space" in result["reason"]

"""The text that trains a vocabulary: long words are cut, and the number of distinct words is limited."""

import random
import time

import pytest
import regex

from gptpipe.formats.tokenizer import PATTERN
from gptpipe.tokenize import tokenizers, training_text
from gptpipe.tokenize.tokenizers import train_tokenizer
from gptpipe.tokenize.training_text import affordable


def letters(n: int, seed: int = 0, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    return "".join(random.Random(seed).choices(alphabet, k=n))


def test_long_words_are_cut_and_other_text_stays_whole() -> None:
    ordinary = [
        "Ordinary text, with a https://example.com/very/long/address/of/a/page.html.",
        "",
        "x" * 32,
        "\n" * 99,
    ]
    hindi, khmer = "ह\u093f" * 50, "ក\u17d2" * 50
    texts = [*ordinary, f"see {letters(100)} here", hindi, khmer, "=" * 99, "1" * 99]
    parts = list(affordable(lambda: texts))
    assert parts[: len(ordinary)] == ordinary
    assert "".join(parts) == "".join(texts)
    assert (
        max(len(piece) for part in parts for piece in regex.findall(PATTERN, part) if not piece.isspace()) == 33
    )


def test_merging_that_takes_long_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of 6.5 million characters without spaces once took 20 seconds without a line."""
    for n_characters, lines in ((3_000_000, 0), (6_500_000, 1)):
        assert len(list(tokenizers._announced([" " * 500_000] * (n_characters // 500_000)))) > 0
        assert capsys.readouterr().err.count("characters are read, merging pairs") == lines


def test_text_with_too_many_distinct_words_is_sampled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts of which a quarter is affordable; one long text; and ordinary text of the same size."""
    monkeypatch.setattr(training_text, "_MAX_DISTINCT_BYTES", 30_000)
    monkeypatch.setattr(training_text, "_BLOCK", 1000)
    for texts in ([letters(1000, seed) for seed in range(100)], [letters(100_000)]):
        sample = list(affordable(lambda texts=texts: texts))
        assert sample == list(affordable(lambda texts=texts: texts))
        assert all(part in "".join(texts) for part in sample)
        assert 10_000 < len("".join(sample)) <= 30_000
    assert (
        "tokenize: too many distinct words; the vocabulary is trained on 0.25 of the text"
        in capsys.readouterr().err
    )
    words = [" ".join(letters(5, seed % 500) for seed in range(200))] * 100
    assert list(affordable(lambda: words)) == words


def test_a_script_without_spaces_is_trained_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each merge visits every byte of the words with that pair; one word of a million letters took minutes."""
    monkeypatch.setattr(training_text, "_MAX_DISTINCT_BYTES", 100_000)
    monkeypatch.setattr(training_text, "_BLOCK", 1000)
    thai = "".join(map(chr, range(0xE01, 0xE2F)))
    texts = [letters(300_000, 0, thai)]
    start = time.process_time()
    trained = train_tokenizer(affordable(lambda: texts), 2000)
    assert time.process_time() - start < 5
    assert max(map(len, trained.ranks)) <= 3 * 32

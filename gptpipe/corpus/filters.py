"""Filters of lines and documents: Gopher's (Rae et al., 2021, arXiv:2112.11446, appendix A.1 and table A1) and those of
C4 (Raffel et al., 2020, arXiv:1910.10683, section 2.2). What a word or a line costs here is paid only where one is on.
"""

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf

from gptpipe.config import FilterParams

_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_LINE_END = (".", "!", "?", '"', "\u201d", "\u2019")
_ELLIPSES = ("...", "\u2026")
_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25e6", "\u2043", "\u25cf")
_SENTENCE_END = re.compile("[.!?][\"')\\]\u201d\u2019]*(?=\\s|$)")
_LETTER = re.compile(r"[^\W\d_]")


def without_boilerplate(text: str, params: FilterParams) -> str:
    """The text without the lines that `drop_lines_*` name; of the blank lines around them one stays."""
    phrases, shortest = [phrase.lower() for phrase in params.drop_lines_with], params.drop_lines_below or 0
    if not (phrases or shortest or params.drop_lines_unfinished):
        return text
    lines = [line for line in text.split("\n") if not line or len(line.split()) >= shortest]
    if params.drop_lines_unfinished:
        lines = [line for line in lines if not line or line.endswith(_LINE_END)]
    lines = [line for line in lines if not any(phrase in line.lower() for phrase in phrases)]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def fault(text: str, params: FilterParams) -> tuple[str, str] | None:
    """The first filter that a text which is not empty does not pass, and what was found there and is allowed."""
    if not params.is_on:
        return None
    for phrase in params.phrases:
        if phrase.lower() in text.lower():
            return "phrases", f"has {phrase!r}"
    for name, value, allowed in _measures(text, params):
        least, most = allowed if isinstance(allowed, tuple) else (0, allowed)
        if not least <= value <= most:
            return name, f"{value:.4g}, allowed is at {f'least {least:g}' if value < least else f'most {most:g}'}"
    return None


def _measures(text: str, params: FilterParams) -> Iterator[tuple[str, float, float | tuple[float, float]]]:
    """Name, value, and the most or the least and most, of each filter of documents; first those that cost least."""
    words, lines = text.split(), [line for line in text.split("\n") if line]
    n = len(words)
    if params.words:
        yield "words", n, params.words
    if params.mean_word_length:
        yield "mean_word_length", sum(map(len, words)) / n, params.mean_word_length
    if params.sentences:
        yield "sentences", len(_SENTENCE_END.findall(text)), (params.sentences, inf)
    if params.symbols_per_word is not None:
        symbols = max(text.count("#"), sum(map(text.count, _ELLIPSES)))
        yield "symbols_per_word", symbols / n, params.symbols_per_word
    if params.ellipsis_lines is not None:
        yield "ellipsis_lines", sum(line.endswith(_ELLIPSES) for line in lines) / len(lines), params.ellipsis_lines
    if params.bullet_lines is not None:
        bullets = sum(line.lstrip().startswith(_BULLETS) for line in lines)
        yield "bullet_lines", bullets / len(lines), params.bullet_lines
    if params.alphabetic_words is not None:
        yield "alphabetic_words", sum(map(bool, map(_LETTER.search, words))) / n, (params.alphabetic_words, inf)
    if params.stop_words:
        bare = {word.strip(string.punctuation) for word in text.lower().split()}
        yield "stop_words", len(_STOP_WORDS & bare), (params.stop_words, inf)
    if params.duplicate_lines:
        yield from _duplicates("duplicate_lines", lines, params.duplicate_lines)
    if params.duplicate_paragraphs:
        yield from _duplicates("duplicate_paragraphs", re.split("\n\n+", text), params.duplicate_paragraphs)
    for size, most in enumerate(params.top_ngrams or (), 2):
        yield f"top_{size}grams", _in_top_ngram(words, size), most
    for size, most in enumerate(params.duplicate_ngrams or (), 5):
        yield f"duplicate_{size}grams", _in_duplicate_ngrams(words, size), most


def _duplicates(name: str, parts: list[str], most: tuple[float, float]) -> Iterator[tuple[str, float, float]]:
    """Shares of the parts, and of their characters, that stood before."""
    parts = [part.strip() for part in parts]
    repeats = [part for part, is_first in zip(parts, _firsts(parts), strict=True) if not is_first]
    yield name, len(repeats) / len(parts), most[0]
    yield f"{name}_characters", sum(map(len, repeats)) / sum(map(len, parts)), most[1]


def _firsts(items: Sequence[object]) -> list[bool]:
    """For each item whether none before it is equal."""
    seen: set[object] = set()
    return [not (item in seen or seen.add(item)) for item in items]  # type: ignore[func-returns-value]


def _ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(size)), strict=False))


def _in_top_ngram(words: list[str], size: int) -> float:
    """Share of the words' characters in the most frequent n-gram, the longest of several; one alone repeats nothing."""
    counted = ((n, sum(map(len, ngram))) for ngram, n in Counter(_ngrams(words, size)).items() if n > 1)
    n, length = max(counted, default=(0, 0))
    return n * length / sum(map(len, words))


def _in_duplicate_ngrams(words: list[str], size: int) -> float:
    """Share of the words' characters inside n-grams that stood before, each character counted once."""
    covered = bytearray(len(words))
    for start, is_first in enumerate(_firsts(_ngrams(words, size))):
        if not is_first:
            covered[start : start + size] = b"\1" * size
    return sum(len(word) for word, is_in in zip(words, covered, strict=True) if is_in) / sum(map(len, words))

"""Filters of lines and documents: Gopher's (Rae et al., 2021, arXiv:2112.11446, appendix A.1 and table A1) and those of
C4 (Raffel et al., 2020, arXiv:1910.10683, section 2.2), by the names that they have in params.yaml.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from math import inf

from gptpipe.collect.params import FilterParams

_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_ELLIPSES = ("...", "\u2026")
_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25e6", "\u2043", "\u25cf")
_LINE_END = (".", "!", "?", '"', "\u201d", "\u2019")
_SENTENCE_END = re.compile("[.!?][\"')\\]\u201d\u2019]*(?=\\s|$)")

# Values of a text, its words and its lines; first what costs least. Each has one limit: the most that is allowed, ...
_MEASURES: dict[str, Callable[[str, list[str], list[str]], Iterable[float]]] = {
    "words": lambda text, words, lines: [len(words)],
    "mean_word_length": lambda text, words, lines: [sum(map(len, words)) / len(words)],
    "sentences": lambda text, words, lines: [len(_SENTENCE_END.findall(text))],
    "symbols_per_word": lambda text, words, lines: [max(text.count("#"), *map(text.count, _ELLIPSES)) / len(words)],
    "ellipsis_lines": lambda text, words, lines: [sum(line.endswith(_ELLIPSES) for line in lines) / len(lines)],
    "bullet_lines": lambda text, words, lines: [sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines)],
    "alphabetic_words": lambda text, words, lines: [sum(any(map(str.isalpha, word)) for word in words) / len(words)],
    "stop_words": lambda text, words, lines: [len(_STOP_WORDS.intersection(re.findall(r"\w+", text.lower())))],
    "duplicate_lines": lambda text, words, lines: _in_repeats(lines),
    "duplicate_paragraphs": lambda text, words, lines: _in_repeats(re.split("\n\n+", text)),
    "top_ngrams": lambda text, words, lines: (_in_top_ngram(words, size) for size in range(2, 5)),
    "duplicate_ngrams": lambda text, words, lines: (_in_repeated_ngrams(words, size) for size in range(5, 11)),
}
_AT_LEAST = ("sentences", "alphabetic_words", "stop_words")  # ... but the least of these, ...
_BETWEEN = ("words", "mean_word_length")  # ... and both of these


def without_boilerplate(text: str, params: FilterParams) -> str:
    """The text without the lines that `drop_lines_*` name; of the blank lines around them one stays."""
    phrases, shortest = [phrase.lower() for phrase in params.drop_lines_with], params.drop_lines_below or 0
    if not (phrases or shortest or params.drop_lines_unfinished):
        return text
    lines = [line for line in text.split("\n") if not line or len(line.split()) >= shortest]
    lines = [line for line in lines if not any(phrase in line.lower() for phrase in phrases)]
    if params.drop_lines_unfinished:
        lines = [line for line in lines if not line or line.endswith(_LINE_END)]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def are_on(params: FilterParams) -> bool:
    """Whether any is; a threshold may be 0."""
    return any(value is not None and value is not False and value != () for value in dict(params).values())


def fault(text: str, params: FilterParams) -> tuple[str, str] | None:
    """The first filter that a text which is not empty does not pass, and what was found there and is allowed."""
    for phrase in params.phrases:
        if phrase.lower() in text.lower():
            return "phrases", f"has {phrase!r}"
    words, lines = text.split(), [line for line in text.split("\n") if line]
    for name, measure in _MEASURES.items():
        if (limit := getattr(params, name)) is not None:
            limits = limit if isinstance(limit, tuple) and name not in _BETWEEN else [limit]
            for value, allowed in zip(measure(text, words, lines), limits, strict=True):
                least, most = allowed if name in _BETWEEN else (allowed, inf) if name in _AT_LEAST else (0, allowed)
                if not least <= value <= most:
                    bound = f"least {least:g}" if value < least else f"most {most:g}"
                    return name, f"{value:.4g}, allowed is at {bound}"
    return None


def _in_repeats(parts: list[str]) -> tuple[float, float]:
    """Shares of the parts, and of their characters, that stood before."""
    parts = [part.strip() for part in parts]
    unique = set(parts)
    return 1 - len(unique) / len(parts), 1 - sum(map(len, unique)) / sum(map(len, parts))


def _ngrams(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(size)), strict=False)


def _in_top_ngram(words: list[str], size: int) -> float:
    """Share of the words' characters in the most frequent n-gram, the longest of several; one alone repeats nothing."""
    counted = ((n, sum(map(len, ngram))) for ngram, n in Counter(_ngrams(words, size)).items() if n > 1)
    n, length = max(counted, default=(0, 0))
    return n * length / sum(map(len, words))


def _in_repeated_ngrams(words: list[str], size: int) -> float:
    """Share of the words' characters inside n-grams that stood before, each character counted once."""
    seen, covered = set[tuple[str, ...]](), [0] * len(words)
    for start, ngram in enumerate(_ngrams(words, size)):
        if ngram in seen:
            covered[start : start + size] = map(len, ngram)
        seen.add(ngram)
    return sum(covered) / sum(map(len, words))

"""Filters of lines and documents, under their names in params.yaml.

They are those of Gopher (Rae et al., 2021, arXiv:2112.11446, appendix A.1 and table A1) and of C4 (Raffel et
al., 2020, arXiv:1910.10683, section 2.2), made for English. Ends of sentences are recognized in every script
that marks them: Unicode's property Sentence_Terminal, and the shad of Tibetan. Words are what spaces separate.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from math import inf
from typing import Any

import regex

from gptpipe.collect.params import FilterParams

_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_ELLIPSES = ("...", "\u2026")
_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25e6", "\u2043", "\u25cf")
_TERMINALS = regex.findall(
    r"(?V1)[\p{Sentence_Terminal}\u0f0d\u0f0e--[.!?]]", "".join(map(chr, range(0x20000)))
)
_CLOSING = "\"')\\]\u201d\u2019\xbb\u203a\u300d\u300f\uff09"  # quotation marks and brackets
_LINE_END = (".", "!", "?", '"', "\u201d", "\u2019", "\xbb", "\u203a", "\u300d", "\u300f", *_TERMINALS)
# A space follows the marks of ASCII, which also occur inside numbers and names, but not those of Chinese.
_SENTENCE_END = re.compile(f"[.!?][{_CLOSING}]*(?=\\s|$)|[{''.join(_TERMINALS)}]+")

_NAMES = (  # of the filters that compare a value of the text with a limit, the cheapest first
    "words",
    "mean_word_length",
    "sentences",
    "symbols_per_word",
    "ellipsis_lines",
    "bullet_lines",
    "alphabetic_words",
    "stop_words",
    "duplicate_lines",
    "duplicate_paragraphs",
    "top_ngrams",
    "duplicate_ngrams",
)
_MINIMUM = ("sentences", "alphabetic_words", "stop_words")  # their limit is a minimum
_MINIMUM_AND_MAXIMUM = ("words", "mean_word_length")  # they have two limits; those of all others are maxima


def without_boilerplate(text: str, params: FilterParams) -> tuple[str, str | None]:
    """The text without the lines that `drop_lines_*` match; of several blank lines around them one stays.

    Also the name of the filter that dropped the last line, or None if a line is left.
    """
    phrases = [phrase.lower() for phrase in params.drop_lines_with]
    shortest = params.drop_lines_below or 0
    if not (phrases or shortest or params.drop_lines_unfinished):
        return text, None
    lines = text.split("\n")
    long = [line for line in lines if not line or len(line.split()) >= shortest]
    wanted = [line for line in long if not any(phrase in line.lower() for phrase in phrases)]
    finished = wanted
    if params.drop_lines_unfinished:
        finished = [line for line in wanted if not line or line.endswith(_LINE_END)]
    if any(lines) and not any(finished):
        steps = {"drop_lines_below": long, "drop_lines_with": wanted, "drop_lines_unfinished": finished}
        return "", next(name for name, left in steps.items() if not any(left))
    return re.sub("\n{3,}", "\n\n", "\n".join(finished)).strip("\n"), None


def are_on(params: FilterParams) -> bool:
    """Whether any filter is on; a limit of 0 is one, too."""
    return any(value is not None and value is not False and value != () for value in dict(params).values())


def fault(text: str, params: FilterParams) -> tuple[str, str] | None:
    """Name of the first filter that rejects a text (not empty), and the value with its limit."""
    for phrase in params.phrases:
        if phrase.lower() in text.lower():
            return "phrases", f"has {phrase!r}"
    words = text.split()
    lines = [line for line in text.split("\n") if line]
    for name in _NAMES:
        limit = getattr(params, name)
        if limit is None:
            continue
        values = _values(name, text, words, lines)
        for value, (minimum, maximum) in zip(values, _ranges(name, limit), strict=True):
            if value < minimum:
                return name, f"{value:.4g}, allowed is at least {minimum:g}"
            if value > maximum:
                return name, f"{value:.4g}, allowed is at most {maximum:g}"
    return None


def _ranges(name: str, limit: Any) -> list[tuple[float, float]]:
    """Minimum and maximum of each value of a filter."""
    if name in _MINIMUM_AND_MAXIMUM:
        return [limit]
    if name in _MINIMUM:
        return [(limit, inf)]
    maxima = limit if isinstance(limit, tuple) else (limit,)
    return [(0, maximum) for maximum in maxima]


def _values(name: str, text: str, words: list[str], lines: list[str]) -> Iterable[float]:
    """What a filter compares with its limits: one value, or several for filters that have several limits."""
    match name:
        case "words":
            return [len(words)]
        case "mean_word_length":
            return [sum(map(len, words)) / len(words)]
        case "sentences":
            return [len(_SENTENCE_END.findall(text))]
        case "symbols_per_word":
            return [max(text.count("#"), *map(text.count, _ELLIPSES)) / len(words)]
        case "ellipsis_lines":
            return [sum(line.endswith(_ELLIPSES) for line in lines) / len(lines)]
        case "bullet_lines":
            return [sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines)]
        case "alphabetic_words":
            return [sum(any(map(str.isalpha, word)) for word in words) / len(words)]
        case "stop_words":
            return [len(_STOP_WORDS.intersection(re.findall(r"\w+", text.lower())))]
        case "duplicate_lines":
            return _repeated(lines)
        case "duplicate_paragraphs":
            return _repeated(re.split("\n\n+", text))
        case "top_ngrams":
            return (_in_top_ngram(words, size) for size in range(2, 5))
        case "duplicate_ngrams":
            return (_in_repeated_ngrams(words, size) for size in range(5, 11))
    raise AssertionError(name)


def _repeated(parts: list[str]) -> tuple[float, float]:
    """Fraction of the parts, and of their characters, that repeat an earlier part."""
    parts = [part.strip() for part in parts]
    unique = set(parts)
    return 1 - len(unique) / len(parts), 1 - sum(map(len, unique)) / sum(map(len, parts))


def _ngrams(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(size)), strict=False)


def _in_top_ngram(words: list[str], size: int) -> float:
    """Fraction of the words' characters in the most frequent n-gram, the longest if tied; 0 if none repeats."""
    counted = ((n, sum(map(len, ngram))) for ngram, n in Counter(_ngrams(words, size)).items() if n > 1)
    n, length = max(counted, default=(0, 0))
    return n * length / sum(map(len, words))


def _in_repeated_ngrams(words: list[str], size: int) -> float:
    """Fraction of the words' characters inside n-grams that occurred before; each character counts once."""
    seen, covered = set[tuple[str, ...]](), [0] * len(words)
    for start, ngram in enumerate(_ngrams(words, size)):
        if ngram in seen:
            covered[start : start + size] = map(len, ngram)
        seen.add(ngram)
    return sum(covered) / sum(map(len, words))

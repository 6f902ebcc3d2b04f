"""What a word is, for comparing texts: in the report about overlap, and in the search for near-duplicates.

Words are compared in lower case and without punctuation. A word is a run of letters, marks, digits and
underscores. It ends where the script changes to one that puts no spaces between words. There, each letter or
sign with its combining marks is a word, but only a fraction of one: `Words.lengths` says how much information
it carries, compared with a word of English. The fractions come from parallel text. For one word of the
Universal Declaration of Human Rights in English there are

- 3.4 to 4.4 letters, marks not counted, in Thai, Lao, Khmer, Burmese and Tibetan: 1/4 word each,
- 2.2 characters in Japanese, 1.3 in Chinese: 2/3 word for each Han character, 1/3 for each kana.

Thirteen words are then 52 letters of Thai, or about 27 characters of Japanese. In that text no two Thai
articles share 36 letters, no two Japanese ones share 20 characters, and no two English ones share 11 words.

Scripts come from the Unicode properties of the package `regex`. Finer rules for words (Unicode Standard Annex
29, as in ICU) only differ inside numbers and contractions, which both texts of a comparison have alike, and
dictionaries for Thai would disagree about the words near the ends of a shared passage.
"""

from functools import cache, lru_cache
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import regex

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.uint8]

WORD_LENGTH = 12  # of a word that is set off by spaces, in the unit of `Words.lengths`

# Kinds of characters.
_SEPARATOR = 0  # space and punctuation
_WORD = 1  # goes on with the word before it
_LETTER = 2  # of an alphabet without spaces; begins a word, as do the next three
_KANA = 3
_HAN = 4
_SIGN = 5  # an operator or bracket, if these are words
_ATTACHED = 6  # a mark in a script without spaces
_IGNORED = 7  # invisible: joiners, soft hyphens, variation selectors
_LENGTHS = np.array([0, 12, 3, 4, 8, 12, 12, 0], np.uint8)

# Line breaking classes SA, AK, AS and AP (Unicode Standard Annex 14): South-East Asian scripts without spaces.
# These classes include two scripts of Sanskrit that are written with spaces today.
_ALPHABETS = (
    r"[[\p{LB=SA}\p{LB=AK}\p{LB=AS}\p{LB=AP}\p{Tibetan}\p{Balinese}\p{Javanese}\p{Batak}\p{Buginese}]"
    r"--[\p{Grantha}\p{Brahmi}]]"
)
_KANAS = r"[\p{scx=Hiragana}\p{scx=Katakana}\p{Bopomofo}]"
_HANS = r"[\p{Han}\p{scx=Han}\p{Yi}\p{Tangut}\p{Nushu}\p{Khitan_Small_Script}]"
_CLASSES = (  # a later class wins
    (_WORD, r"[\p{L}\p{M}\p{N}_]"),
    (_HAN, rf"[{_HANS}&&[\p{{L}}\p{{Nl}}]]"),
    (_KANA, rf"[{_KANAS}&&\p{{L}}]"),
    (_LETTER, rf"[{_ALPHABETS}&&\p{{L}}]"),
    (_ATTACHED, rf"[[{_ALPHABETS}{_KANAS}{_HANS}]&&\p{{M}}]"),
    (_IGNORED, r"[\p{Default_Ignorable_Code_Point}--\u200b]"),  # U+200B separates words
)
_END_OF_LETTERS = 0x34000  # no Unicode version has letters or marks in higher planes
_INVISIBLE = slice(0xE0000, 0xE1000)  # tags and variation selectors
# Operators, brackets and sigils; of the marks at the end, only those that `_PROSE` does not match.
_SIGNS = r"[[\p{Math}*/%\\^&@#$()\[\]{}\-'!?.:]--[\p{L}\p{M}\p{N}\p{Default_Ignorable_Code_Point}]]"
# Quotation marks around a part of a line. Any other ' after a word is a prime, as in f'(x).
_QUOTATION = regex.compile(
    r"""
    (?| (?<![\w)\]}'])'(?=[^\s'])          # opens after a space or operator, before what is quoted
        ((?:[^'\n\0]++|\b'\b)*+)           # which may contain apostrophes
    |   (?<=\b[bruBRU])'([\w\\][^'\n\0]*+) # or after the prefix of a string literal
    ) '(?!\w)
    """,
    regex.VERBOSE,
)
# Marks that are both operators and punctuation, where they are punctuation of prose.
_PROSE = regex.compile(
    r"""
    (?<![^\s\0])--(?![^\s\0]) | \b--\b | -{3,}  # a dash; not i-- or --i
    | (?<=\w\w)[!?]+(?=[\s\0"')\]\u201d\u2019\xbb]|$)  # the end of a sentence; not !a, n!, a?.b or a ? b
    | (?<![\w)\]}'])' | '(?=\w)             # a quotation mark or apostrophe; not f'
    | (?<=\b[bruBRU])''(?!')                # the literal of an empty string
    | \.{3,} | [.:](?![.:=*/^+])            # not a::b, a..b, a := b or a .* b
    """,
    regex.VERBOSE,
)

# Bases of the polynomials. They are odd, so they have inverses modulo 2**64.
_CHARACTER_BASE = 0x9E3779B97F4A7C15
_RUN_BASE = 0xD6E8FEB86659FD93


class Words(NamedTuple):
    """The words of a list of texts, in their order."""

    hashes: Hashes
    texts: Indices  # for each word: the index of its text
    lengths: npt.NDArray[np.uint8]  # WORD_LENGTH, or less in a script without spaces


def split_words(texts: list[str], *, signs: bool = False) -> Words:
    """The words of texts that contain no \\0. With `signs`, each operator and bracket is a word, too,
    and so are the marks of prose where they are operators, as in i--, f'(x) and a?.b.

    Computed on whole arrays: no Python loop visits a word. It takes about 60 bytes of memory for each
    character.
    """
    joined = "\0".join(texts)
    if signs:
        joined = _PROSE.sub(" ", _QUOTATION.sub(r" \1 ", joined))
    content, kinds = _characters(joined.replace("\n", " ").replace("\0", "\n"), signs)
    before = np.empty_like(kinds)
    before[:1], before[1:] = _SEPARATOR, kinds[:-1]
    is_in_word = kinds != _SEPARATOR
    begins = (
        is_in_word & ((kinds != _WORD) | (before != _WORD)) & ((kinds != _ATTACHED) | (before == _SEPARATOR))
    )
    is_end = np.empty_like(begins)  # of a word, at its last character
    is_end[:-1], is_end[-1:] = is_in_word[:-1] & (begins[1:] | ~is_in_word[1:]), is_in_word[-1:]
    starts, ends = np.flatnonzero(begins), np.flatnonzero(is_end) + 1
    first_words = np.searchsorted(starts, np.flatnonzero(content == ord("\n")))  # of each text but the first
    n_words = np.diff(first_words, prepend=0, append=len(starts))
    return Words(
        hashes=RunHasher(content.astype(np.uint64), _CHARACTER_BASE)(starts, ends),
        texts=np.repeat(np.arange(len(n_words)), n_words),
        lengths=_LENGTHS[kinds[starts]],
    )


def _characters(text: str, signs: bool) -> tuple[npt.NDArray[np.unsignedinteger], Kinds]:
    """The code points of the text in lower case, and their kinds."""
    kind_of = _kinds(signs)
    if text.isascii():
        lowered = text.lower().encode()
        kinds_of_bytes = lowered.translate(kind_of[:256].tobytes())
        return np.frombuffer(lowered, np.uint8), np.frombuffer(kinds_of_bytes, np.uint8)
    code_points = np.frombuffer(text.lower().encode("utf-32-le"), np.uint32)
    kinds = kind_of[code_points]
    is_visible = kinds != _IGNORED
    return (code_points, kinds) if is_visible.all() else (code_points[is_visible], kinds[is_visible])


@cache
def _kinds(signs: bool) -> Kinds:
    """The kind of each code point."""
    assigned = "".join(map(chr, range(_END_OF_LETTERS)))
    kinds = np.full(0x110000, _SEPARATOR, np.uint8)
    for kind, characters in (*_CLASSES, *([(_SIGN, _SIGNS)] if signs else [])):
        for match in regex.finditer(f"(?V1){characters}+", assigned):
            kinds[match.start() : match.end()] = kind
    kinds[_INVISIBLE] = _IGNORED
    return kinds


def hash_shingles(texts: list[str], n: int) -> tuple[Hashes, Hashes]:
    """Hashes of the runs of n words and signs of each text, and where those of each text start, with the total.

    Each word counts as one, also in a script without spaces: similar texts share most of their shingles, of any
    length. A text of fewer words is one shingle. If it has no word at all, its characters are hashed.
    """
    words = split_words(texts, signs=True)
    bounds = np.searchsorted(words.texts, np.arange(len(texts) + 1))
    n_words = np.diff(bounds)
    counts = np.maximum(n_words - n + 1, 1)  # of shingles
    offsets = np.concatenate([[0], np.cumsum(counts)])
    text_of_shingle = np.repeat(np.arange(len(texts)), counts)
    starts = np.arange(offsets[-1]) - (offsets - bounds)[text_of_shingle]
    hashes = RunHasher(words.hashes)(starts, np.minimum(starts + n, bounds[text_of_shingle + 1]))
    for i in np.flatnonzero(n_words == 0):
        hashes[offsets[i]] = int(sha256(texts[i].encode()).hexdigest()[:16], 16)
    return hashes, offsets.astype(np.uint64)


class RunHasher:
    """Hashes of runs of values: the sum of values[start + i] * base**i, modulo 2**64.

    Each is the difference of two running sums (Karp and Rabin, 1987).
    """

    def __init__(self, values: Hashes, base: int = _RUN_BASE) -> None:
        size = 1 << len(values).bit_length()
        self._sums = np.concatenate(
            [np.zeros(1, np.uint64), np.cumsum(values * _powers(base, size)[: len(values)])]
        )
        self._inverse_powers = _powers(pow(base, -1, 1 << 64), size)

    def __call__(self, starts: Indices, ends: Indices) -> Hashes:
        return np.asarray((self._sums[ends] - self._sums[starts]) * self._inverse_powers[starts], np.uint64)

    def of_length(self, n: int) -> Hashes:
        """Hashes of all runs of n values."""
        n_runs = max(0, len(self._sums) - n)
        return np.asarray((self._sums[n:] - self._sums[:n_runs]) * self._inverse_powers[:n_runs], np.uint64)


@lru_cache(32)
def _powers(base: int, n: int) -> Hashes:
    """base**1 to base**n; a sum and its inverse power start at the same exponent, so the exponents cancel."""
    powers: Hashes = np.cumprod(np.full(n, base, np.uint64), dtype=np.uint64)
    return powers

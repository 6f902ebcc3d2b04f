"""Hashes of all n-grams of words in a list of texts, computed on whole arrays instead of word by word.

Words are compared in lower case and without punctuation. In scripts that put no space between words, each
character counts as a word. A word's hash is a polynomial of its UTF-8 bytes modulo 2**64; an n-gram's hash is a
polynomial of its words' hashes. Both are differences of one running sum (Karp and Rabin, 1987), so no Python
loop visits a word.
"""

import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gptpipe.collect.near_duplicates import UNSPACED

# Bases of the polynomials. They are odd, so they have inverses modulo 2**64.
_BYTE_BASE = 0x9E3779B97F4A7C15
_WORD_BASE = 0xD6E8FEB86659FD93
# For bytes.translate: lower-case ASCII; punctuation becomes a space. A line feed separates texts.
_LOWER_ASCII = bytes(c if c > 127 or c in b"\n_" or chr(c).isalnum() else 32 for c in range(256)).lower()
_PUNCTUATION = re.compile(f"[^\\w\x00-\x7f{UNSPACED}]+")  # beyond ASCII
_UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


def hash_ngrams(texts: list[str], n: int) -> tuple[Hashes, Indices]:
    """The hash of each run of n words, in the order of the texts, and the index of the text that contains it."""
    content = np.frombuffer(_comparable(texts), np.uint8)
    is_word = np.concatenate([[False], content > ord(" "), [False]])
    word_starts = np.flatnonzero(is_word[1:] > is_word[:-1])
    word_ends = np.flatnonzero(is_word[1:] < is_word[:-1])
    text_of_word = np.searchsorted(np.flatnonzero(content == ord("\n")), word_starts)
    word_hashes = _hash_slices(content.astype(np.uint64), word_starts, word_ends, _BYTE_BASE)

    first_words = np.arange(max(0, len(word_starts) - n + 1))
    hashes = _hash_slices(word_hashes, first_words, first_words + n, _WORD_BASE)
    is_in_one_text = text_of_word[first_words] == text_of_word[first_words + n - 1]
    return hashes[is_in_one_text], text_of_word[first_words][is_in_one_text]


def _comparable(texts: list[str]) -> bytes:
    """UTF-8 of the texts as their words are compared, with a line feed between two texts."""
    lowered = (text if text.isascii() else _lower_unicode(text) for text in texts)
    joined = "\0".join(lowered).replace("\n", " ").replace("\0", "\n")  # no clean text contains \0
    return joined.encode().translate(_LOWER_ASCII)


def _lower_unicode(text: str) -> str:
    """Lower case; punctuation beyond ASCII becomes a space, and spaces surround each character that is a word."""
    return _UNSPACED_CHARACTER.sub(r" \g<0> ", _PUNCTUATION.sub(" ", text.lower()))


def _hash_slices(values: Hashes, starts: Indices, ends: Indices, base: int) -> Hashes:
    """For each slice of the values, the sum of values[start + i] * base**i, modulo 2**64."""
    size = 1 << len(values).bit_length()
    powers = _powers(base, size)[: len(values)]
    inverse_powers = _powers(pow(base, -1, 1 << 64), size)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    return np.asarray((sums[ends] - sums[starts]) * inverse_powers[starts], np.uint64)


@lru_cache(32)
def _powers(base: int, n: int) -> Hashes:
    """base**1 to base**n; a sum and its inverse power start at the same exponent, so the exponents cancel."""
    powers: Hashes = np.cumprod(np.full(n, base, np.uint64), dtype=np.uint64)
    return powers

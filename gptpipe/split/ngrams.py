"""The runs of words by which texts are compared, as hashes: all n-grams, and short texts as a whole.

An n-gram is a run of n words. In a script without spaces, where a word is a single letter and counts as less
(gptpipe/collect/words.py), it is the shortest run that counts at least n words. A text that counts less than n
words has no n-gram. It is compared as a whole if it counts at least `MIN_WORDS`; shorter texts, such as the
answer `yes`, would occur in any corpus.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd

from gptpipe.collect.words import WORD_LENGTH, Hashes, Indices, RunHasher, split_words

MIN_WORDS = 5  # of a text that is examined
_MAX_FILTER_BITS = 23

Flags = npt.NDArray[np.bool_]


class Lookup:
    """Finds hashes in a set of hashes."""

    def __init__(self, hashes: Hashes) -> None:
        self.size = len(hashes)
        self._index = pd.Index(hashes)
        # Builds its table before threads share it: they could see half of it.
        self._index.get_indexer(self._index[:1])
        # Whether a member begins with these bits. Most hashes are not in the set; this tells ten times faster.
        self._n_bits = min(_MAX_FILTER_BITS, len(hashes).bit_length() + 3)
        self._has_bits = np.zeros(1 << self._n_bits, np.bool_)
        self._has_bits[self._first_bits(hashes)] = True

    def _first_bits(self, hashes: Hashes) -> Hashes:
        return np.asarray(hashes >> np.uint64(64 - self._n_bits))

    def find(self, hashes: Hashes) -> tuple[Indices, Indices]:
        """The positions in `hashes` of those that are in the set, and the index of each in the set."""
        positions = np.flatnonzero(self._has_bits[self._first_bits(hashes)])
        indices = self._index.get_indexer(pd.Index(hashes[positions]))
        return positions[indices >= 0], indices[indices >= 0]


class Runs:
    """The n-grams and the short texts of a list of texts.

    `hashes` are those of the n-grams, then of the short texts; `texts` are the indices of the texts that
    contain them; `prefixes` are hashes of the first words of short texts, 0 for n-grams. `examined` are the
    indices of the texts that are not too short.
    """

    def __init__(self, texts: list[str], n: int) -> None:
        words = split_words(texts)
        self._hash = RunHasher(words.hashes)
        self._text_of_word = words.texts
        # The length of all words before each word, and of all words.
        self._positions = np.concatenate([[0], np.cumsum(words.lengths, dtype=np.int64)])
        self._ngram_length = n * WORD_LENGTH
        self._n_prefix = min(MIN_WORDS, n)  # no word counts more than one, so each examined text has this many

        first_words = np.flatnonzero(np.diff(words.texts, prepend=-1))
        text_ends = np.append(first_words[1:], len(words.texts))[: len(first_words)]
        lengths = self._positions[text_ends] - self._positions[first_words]
        is_examined = lengths >= self._n_prefix * WORD_LENGTH
        is_short = is_examined & (lengths < self._ngram_length)
        short_starts, short_ends = first_words[is_short], text_ends[is_short]
        starts, ngrams = self._ngrams(n)

        self.hashes = np.concatenate([ngrams, self._hash(short_starts, short_ends)])
        self.texts = np.concatenate([words.texts[starts], words.texts[short_starts]])
        self.prefixes = np.zeros(len(self.hashes), np.uint64)
        self.prefixes[len(starts) :] = self._hash(short_starts, short_starts + self._n_prefix)
        self.examined = words.texts[first_words[is_examined]]

    def _ngrams(self, n: int) -> tuple[Indices, Hashes]:
        """Start and hash of each n-gram."""
        if self._positions[-1] == len(self._text_of_word) * WORD_LENGTH:  # no word counts less than one
            return self._runs_of_length(n)
        starts = np.arange(len(self._text_of_word))
        ends = np.searchsorted(self._positions, self._positions[:-1] + self._ngram_length)
        starts, ends = self._inside_texts(starts, ends)
        return starts, self._hash(starts, ends)

    def _runs_of_length(self, n: int) -> tuple[Indices, Hashes]:
        """Start and hash of each run of n words, however much these count."""
        hashes = self._hash.of_length(n)
        is_inside = self._text_of_word[: len(hashes)] == self._text_of_word[n - 1 :]
        return np.flatnonzero(is_inside), hashes[is_inside]

    def _inside_texts(self, starts: Indices, ends: Indices) -> tuple[Indices, Indices]:
        """The runs that end in the text in which they start. Ends must be in ascending order."""
        n_inside = np.searchsorted(ends, len(self._text_of_word), side="right")
        starts, ends = starts[:n_inside], ends[:n_inside]
        is_inside = self._text_of_word[starts] == self._text_of_word[ends - 1]
        return starts[is_inside], ends[is_inside]

    def find_short(self, hashes: Lookup, prefixes: Lookup) -> tuple[Indices, Indices]:
        """Where short texts occur: the indices of their hashes in `hashes`, and of the texts that contain them.

        Only runs that begin like a short text are compared with the short texts, of each length that is
        possible.
        """
        starts, hashes_of_prefixes = self._runs_of_length(self._n_prefix)
        is_prefix, _ = prefixes.find(hashes_of_prefixes)
        starts = starts[is_prefix]
        ends = starts + self._n_prefix
        found, texts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while len(starts):
            is_match, indices = hashes.find(self._hash(starts, ends))
            found.append(indices)
            texts.append(self._text_of_word[starts[is_match]])
            starts, ends = self._inside_texts(starts, ends + 1)
            is_shorter = self._positions[ends] - self._positions[starts] < self._ngram_length
            starts, ends = starts[is_shorter], ends[is_shorter]
        return np.concatenate(found), np.concatenate(texts)

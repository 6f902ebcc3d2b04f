"""Sentences of held-out documents and their words, for evaluations that swap or complete words."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import regex

from gptpipe.formats.streams import Stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.score.metrics import ratio

MIN_WORDS = 5
MAX_WORDS = 40
_MAX_TOKENS = 1 << 20  # of held-out text that is searched for sentences

# Letters of scripts with spaces between words: by Unicode's rules, no line ends between two of them (Unicode
# Standard Annex 14, classes AL and HL; Hangul is the exception).
_SPACED = r"[[\p{L}&&[\p{LB=AL}\p{LB=HL}\p{Hangul}]]\p{N}_]"
_ATTACHED = r"[\p{M}\u200c\u200d]"  # marks and joiners
# In other scripts, a word is one letter with its marks.
_WORD = regex.compile(
    rf"(?V1)(?P<spaced>{_SPACED}(?:{_SPACED}|{_ATTACHED}|['\u2019\-](?={_SPACED}))*)|\p{{L}}{_ATTACHED}*"
)
_CLOSING = r"[\p{Pe}\p{Pf}\"']"  # brackets and quotation marks
# Where a sentence ends: behind a full stop and a space, behind a full stop of Chinese and Japanese, at an empty
# line, and in Thai and its relatives, which do not mark it, at a space.
_END = regex.compile(
    rf"(?V1)(?<=\p{{STerm}}{_CLOSING}*)\s+|(?<=[\u3002\uff01\uff1f]{_CLOSING}*)\s*|\s*\n\s*\n\s*"
    rf"|(?<=\p{{LB=SA}}{_ATTACHED}*)\s+(?=\p{{LB=SA}})"
)


class Word(NamedTuple):
    """A word as a part of its document's text."""

    start: int
    end: int
    is_spaced: bool  # it is of a script with spaces between words


class Sentence(NamedTuple):
    """A sentence of `MIN_WORDS` to `MAX_WORDS` words, as a part of a document's text."""

    document: int  # row of the stream's table
    text: str  # of the document
    start: int
    end: int
    words: list[Word]


def sentences_of(stream: Stream, tokenizer: Tokenizer) -> list[Sentence]:
    """The sentences of the documents, in the order of their ids, from about a million tokens of text."""
    return [
        sentence
        for row, text in _documents(stream, tokenizer)
        for sentence in _sentences_in(row, text)
        if MIN_WORDS <= len(sentence.words) <= MAX_WORDS
    ]


def mean_over_documents(values: Sequence[float], documents: Sequence[int]) -> tuple[float, float]:
    """The mean of one value per sentence, and its standard error, which treats documents as independent.

    `documents` are the documents of the sentences.
    """
    _, rows = np.unique(documents, return_inverse=True)
    n_sentences = np.bincount(rows).astype(np.float64)
    return ratio(np.bincount(rows, weights=np.asarray(values, np.float64)).astype(np.float64), n_sentences)


def _documents(stream: Stream, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Row and text of documents. Ids are digests, so their order is independent of the text."""
    rows = stream.documents["id"].argsort(kind="stable").to_numpy()
    starts = stream.documents["offset"].to_numpy()[rows]
    lengths = stream.documents["n_tokens"].to_numpy()[rows]
    n_read = int(np.searchsorted(lengths.cumsum(), _MAX_TOKENS)) + 1
    for row, start, length in zip(rows[:n_read], starts, lengths, strict=False):
        yield int(row), tokenizer.decode(stream.tokens[start : start + length].tolist())


def _sentences_in(row: int, text: str) -> Iterator[Sentence]:
    start = 0
    for end, next_start in [*(match.span() for match in _END.finditer(text)), (len(text), len(text))]:
        words = [
            Word(match.start(), match.end(), match["spaced"] is not None)
            for match in _WORD.finditer(text, start, end)
        ]
        yield Sentence(row, text, start, end, words)
        start = next_start

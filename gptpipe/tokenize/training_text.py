"""The text that a vocabulary is trained on: train documents, in an amount that the trainer can process.

rustbpe keeps each distinct word in memory: 250 bytes for a word of usual length, 40 times its size for a long
one. Each merge visits every word that contains the pair, from its first to its last byte. Words of a script
without spaces, of genome data or of base64 are long, and hardly any occurs twice. Two limits bound the cost for
any text:

- A longer word than `_MAX_WORD` characters is cut, for training only. No useful token is longer.
- If the distinct words exceed `_MAX_DISTINCT_BYTES`, half of the text is used, or a quarter, and so on.

With both, 50 MB of random letters take 18 seconds of CPU time and 370 MB of memory for 4,096 entries.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from zlib import crc32

import regex

from gptpipe.shell.console import Progress, say

_MAX_WORD = 32  # characters
_MAX_DISTINCT_BYTES = 8 << 20  # UTF-8; English has 1 million distinct words of 8 bytes in about 100 MB
_BLOCK = 1 << 16  # characters
_LONG_RUN = re.compile(rf"\S{{{_MAX_WORD + 1},}}")  # a fast test; most texts have none
# The runs of PATTERN in gptpipe/formats/tokenizer.py that can be long: letters with marks, and signs.
_LONG_WORD = regex.compile(
    rf"[\p{{L}}\p{{M}}]{{{_MAX_WORD + 1},}}|[^\s\p{{L}}\p{{M}}\p{{N}}]{{{_MAX_WORD + 1},}}"
)
_WORD = re.compile(r"[^\s!-@\[-`{-~]+")  # nearly a word of PATTERN, several times as fast


def affordable(read: Callable[[], Iterable[str]]) -> Iterator[str]:
    """The texts of `read()`, or a sample of them that is within the limits, in parts if they have long words.

    The texts are read several times. The result depends on nothing but the texts.
    """
    share = 1.0
    while not _is_affordable(_parts(_sample(read(), share))):
        share /= 2
        say(f"tokenize: too many distinct words; the vocabulary is trained on {share:.3g} of the text")
    return _parts(_sample(read(), share))


def _sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """About a share of the texts, in blocks, so that a sample of a few long texts is not empty."""
    if share == 1:
        yield from texts
        return
    for text in texts:
        for start in range(0, len(text), _BLOCK):
            block = text[start : start + _BLOCK]
            if crc32(block.encode()) < share * 2**32:
                yield block


def _is_affordable(texts: Iterable[str]) -> bool:
    seen = set[str]()
    n_bytes = 0
    with Progress("tokenize: words", unit="texts") as progress:
        for text in progress.track(texts):
            new = set(_WORD.findall(text)) - seen
            seen |= new
            n_bytes += len("".join(new).encode())
            if n_bytes > _MAX_DISTINCT_BYTES:
                return False
    return True


def _parts(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside words of more than `_MAX_WORD` characters."""
    for text in texts:
        if not _LONG_RUN.search(text):
            yield text
            continue
        start = 0
        for word in _LONG_WORD.finditer(text):
            for end in range(word.start() + _MAX_WORD, word.end(), _MAX_WORD):
                yield text[start:end]
                start = end
        yield text[start:]

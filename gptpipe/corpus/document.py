"""One text of the corpus and where it came from, or why it is not there."""

import hashlib


class Document:
    """A text as cleaning leaves it. Made for each of millions of texts, so it encodes once and holds what it finds."""

    __slots__ = ("id", "n_bytes", "source", "text")

    def __init__(self, source: str, text: str) -> None:
        content = text.encode()
        self.source = source  # the source's kind, and its position where a kind is used twice
        self.text = text
        # SHA-256 of the text's UTF-8 bytes, as hex digits: the same text has the same id on every machine.
        self.id = hashlib.sha256(content).hexdigest()
        self.n_bytes = len(content)  # of the text in UTF-8


class Rejected(Exception):
    """A document that does not belong in the corpus; `reason` is what it is counted under, `why` what was found."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(reason, why)
        self.reason, self.why = reason, why

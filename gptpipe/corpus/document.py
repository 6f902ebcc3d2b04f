"""The unit that flows through collect: one text and where it came from."""

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """A text as a source gives it, or as cleaning leaves it."""

    source: str  # the source's kind, and its position where a kind is used twice
    text: str

    @cached_property
    def id(self) -> str:
        """SHA-256 of the text's UTF-8 bytes, as hex digits: the same text has the same id on every machine."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def n_bytes(self) -> int:
        """Of the text in UTF-8."""
        return len(self.text.encode())

"""What names a document, and why a text is none."""

import hashlib


def id_of(content: bytes) -> str:
    """SHA-256 of a clean text's UTF-8 bytes, as hex digits: the same text has the same id on every machine."""
    return hashlib.sha256(content).hexdigest()


class Rejected(Exception):
    """A document that does not belong in the corpus; `reason` is what it is counted under, `why` what was found."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(reason, why)
        self.reason, self.why = reason, why

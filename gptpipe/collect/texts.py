"""What readers yield: lists of raw texts, with a `Rejected` for whatever has no text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Reasons that mean a damaged or unexpected record. `on_bad` of the source says whether one stops the stage.
BAD_REASONS = frozenset({"not_json", "not_utf8", "no_key", "line_too_long", "unreadable"})


class Piece(str):
    """A text that continues the text before it, because the whole text was too long."""

    __slots__ = ()


@dataclass(frozen=True)
class Rejected:
    """A text that does not belong in the corpus."""

    reason: str  # the name of its count
    detail: str = ""  # for the report: what is wrong with it; for a bad record the line of the error message

    @property
    def is_bad(self) -> bool:
        return self.reason in BAD_REASONS


# Lists of consecutive texts. Passing them one by one costs as much as cleaning them.
Texts = Iterator[Sequence[str | Rejected]]


def contains_rejected(texts: Sequence[str | Rejected]) -> bool:
    """Whether a text of a list is rejected.

    Few lists have one, and looking at the texts one by one takes several times as long.
    """
    return Rejected in set(map(type, texts))


def lengths(texts: Sequence[str | Rejected]) -> list[int]:
    """Characters of each text, 0 for a rejected one."""
    if not contains_rejected(texts):
        return list(map(len, texts))  # type: ignore[arg-type]
    return [0 if isinstance(text, Rejected) else len(text) for text in texts]

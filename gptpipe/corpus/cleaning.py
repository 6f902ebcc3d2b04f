"""One raw text in, a clean one or the reason of its rejection out."""

import re
import unicodedata

from gptpipe.config import CollectParams

# Control characters but for tab and line feed: C0, DEL and C1.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE_END_SPACE = re.compile("[ \t]+$", re.MULTILINE)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Rejected(Exception):
    """A document that does not belong in the corpus; `reason` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def clean(text: str, params: CollectParams) -> str:
    """The text in Unicode NFC with plain line ends, no byte order mark, control characters or trailing space.

    Raises Rejected: `lone_surrogates` (no UTF-8 form exists), `empty`, `too_short`.
    """
    if _SURROGATE.search(text):
        raise Rejected("lone_surrogates")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", unicodedata.normalize("NFC", text))
    text = _LINE_END_SPACE.sub("", text).strip("\n")
    if not text.strip():
        raise Rejected("empty")
    if len(text.encode()) < params.min_document_bytes:
        raise Rejected("too_short")
    return text


def cut(text: str, max_bytes: int) -> list[str]:
    """The text in pieces of at most `max_bytes` UTF-8 bytes, cut after a line where one ends in a piece's last half."""
    pieces: list[str] = []
    start = 0
    while start < len(text):
        # A character has at least one byte, so max_bytes characters hold any piece; decoding drops a broken last one.
        window = text[start : start + max_bytes]
        if start + len(window) == len(text) and len(window.encode(errors="surrogatepass")) <= max_bytes:
            piece = window
        else:
            piece = window.encode(errors="surrogatepass")[:max_bytes].decode(errors="ignore")
            line_end = piece.rfind("\n", len(piece) // 2)
            piece = piece[: line_end + 1] if line_end >= 0 else piece
        pieces.append(piece)
        start += len(piece)
    return pieces

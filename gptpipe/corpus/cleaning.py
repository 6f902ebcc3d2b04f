"""One raw text in, a clean one or the reason of its rejection out."""

import re
import unicodedata

from gptpipe.config import CollectParams
from gptpipe.corpus.filters import fault, without_boilerplate

# Control characters but for tab and line feed: C0, DEL and C1.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ASCII_CONTROL = dict.fromkeys([*range(9), *range(11, 32), 127])
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_SPACE = re.compile(r"(?<!\s)(\s{1000})\s+")
_TEN_SPACES = re.compile(r"\s{10}")


class Rejected(Exception):
    """A document that does not belong in the corpus; `reason` is what it is counted under, `why` what was found."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(reason, why)
        self.reason, self.why = reason, why


def clean(text: str, params: CollectParams) -> str:
    """The text in Unicode NFC with plain line ends; no byte order mark, control character, trailing space, boilerplate.

    Of more than 1,000 white characters in a row the rest goes: a million of them make tiktoken's matcher overflow its
    stack. Raises Rejected: `lone_surrogates` (no UTF-8 form exists), `empty`, `too_short`, a filter's name.
    """
    if not text.isascii() and _SURROGATE.search(text):
        raise Rejected("lone_surrogates")
    text = plain_line_ends(text.removeprefix("\ufeff"))
    if text.isascii():  # noqa: SIM108  of ASCII, translate is several times as fast as the expression
        text = text.translate(_ASCII_CONTROL)
    else:
        text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    text = without_boilerplate(text.strip("\n"), params.filters)
    if len(text) > 1000 and _TEN_SPACES.search(text[::100]):  # every hundredth: a thousand of them show as ten
        text = _LONG_SPACE.sub(r"\1", text)
    if not text.strip():
        raise Rejected("empty")
    if len(text) < params.min_document_bytes and len(text.encode()) < params.min_document_bytes:
        raise Rejected("too_short", f"{len(text.encode())} bytes, allowed is at least {params.min_document_bytes}")
    if found := fault(text, params.filters):
        raise Rejected(*found)
    return text


def plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def cut(text: str, max_bytes: int) -> list[str]:
    """The text in pieces of at most `max_bytes` UTF-8 bytes, cut after a line where one ends in a piece's last half.

    A last piece shorter than that may go on where the text goes on: cut it again with what follows.
    """
    pieces: list[str] = []
    start = 0
    while start < len(text):
        # A character has at least one byte, so max_bytes characters hold any piece.
        encoded = text[start : start + max_bytes].encode(errors="surrogatepass")
        if len(encoded) <= max_bytes and start + max_bytes >= len(text):
            pieces.append(text[start:])
            break
        end = min(max_bytes, len(encoded))
        while end < len(encoded) and encoded[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        piece = encoded[:end].decode(errors="surrogatepass")
        line_end = piece.rfind("\n", len(piece) // 2)
        pieces.append(piece[: line_end + 1] if line_end >= 0 else piece)
        start += len(pieces[-1])
    return pieces

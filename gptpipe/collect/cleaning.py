"""Raw texts in, for each a clean one or the reason of its rejection out."""

import re
import unicodedata
from collections.abc import Sequence

from gptpipe.collect.batch import Rejected
from gptpipe.collect.filters import are_on, fault, without_boilerplate
from gptpipe.collect.params import CollectParams, FilterParams

_BETWEEN = "\n\0\n"  # texts that are cleaned together
# Control characters but for tab, line feed and the one between texts: C0 and DEL, and C1 as it is in UTF-8.
_ASCII_CONTROL = bytes([*range(1, 9), *range(11, 32), 127])
_C1_CONTROL = re.compile(b"\xc2[\x80-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_SPACE = re.compile(r"(?<!\s)(\s{1000})\s+")
_TEN_SPACES = re.compile(r"\s{10}")
_MARK = "[" + "".join(filter(unicodedata.combining, map(chr, range(0x300, 0x1E94B)))) + "]"  # all that combine
_LONG_MARKS, _TEN_MARKS = re.compile(f"({_MARK}{{1000}}){_MARK}+"), re.compile(f"{_MARK}{{10}}")


def clean(texts: Sequence[str | Rejected], params: CollectParams) -> list[str | Rejected]:
    """Each in Unicode NFC with plain line ends; no byte order mark, control character, trailing space, boilerplate.

    Of more than 1,000 white characters in a row the rest goes: a million of them make tiktoken's matcher overflow its
    stack; also of combining marks, for NFC takes time by their square. Or Rejected: as it came in, `lone_surrogates`
    (no UTF-8 form exists), `empty`, `too_short`, a filter's name. Texts go through all that looks at each character as
    one: a short text alone costs several times as much.
    """
    try:
        rest = iter(_plain([text for text in texts if isinstance(text, str)]))
    except UnicodeEncodeError:
        lone = Rejected("lone_surrogates")
        return clean([lone if isinstance(text, str) and _SURROGATE.search(text) else text for text in texts], params)
    filters = params.filters if are_on(params.filters) else None
    return [
        text if isinstance(text, Rejected) else _finished(next(rest), params.min_document_bytes, filters)
        for text in texts
    ]


def _plain(texts: list[str]) -> list[str]:
    """The texts without byte order marks, control characters, and white space at the ends of lines.

    Raises UnicodeEncodeError where one has a lone surrogate.
    """
    joined = _BETWEEN.join(["", *texts])
    if joined.count("\0") > len(texts):  # any other control character goes the same way
        joined = _BETWEEN.join(["", *(text.replace("\0", "\1") for text in texts)])
    content = plain_line_ends(joined.replace("\0\n\ufeff", "\0\n")).encode().translate(None, _ASCII_CONTROL)
    joined = (content if content.isascii() else _C1_CONTROL.sub(b"", content)).decode()
    if " \n" in joined or "\t\n" in joined or joined.endswith((" ", "\t")):
        joined = "\n".join([line.rstrip(" \t") for line in joined.split("\n")])
    return joined.split("\0")[1:]


def _finished(text: str, min_bytes: int, filters: FilterParams | None) -> str | Rejected:
    text = text.lstrip("\n\ufeff").rstrip("\n")
    if not text.isascii():
        text = _without_long_marks(unicodedata.normalize("NFC", _without_long_marks(text)))  # NFC can double them
    if filters:
        text = without_boilerplate(text, filters)
    if len(text) > 1000 and _TEN_SPACES.search(text[::100]):
        text = _LONG_SPACE.sub(r"\1", text).rstrip("\n\t ")  # the end may be another now
    if not text or text.isspace():
        return Rejected("empty")
    if len(text) < min_bytes and len(text.encode()) < min_bytes:
        return Rejected("too_short", f"{len(text.encode())} bytes, allowed is at least {min_bytes}")
    if filters and (failed := fault(text, filters)):
        return Rejected(*failed)
    return text


def _without_long_marks(text: str) -> str:
    """The text with at most 1,000 combining marks in a row."""
    if len(text) > 1000 and _TEN_MARKS.search(text[::100]):  # of 1,000 in a row, every hundredth character is one
        return _LONG_MARKS.sub(r"\1", text)
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

"""Cleans raw texts: returns for each a clean text, or the reason why it is rejected."""

import re
import unicodedata
from collections.abc import Sequence

from gptpipe.collect.filters import are_on, fault, without_boilerplate
from gptpipe.collect.params import CollectParams, FilterParams
from gptpipe.collect.texts import Piece, Rejected

_SEPARATOR = "\n\0\n"  # between texts that are cleaned together
# Control characters that break a line (vertical tab, form feed, separators of files, groups and records; NEL in
# UTF-8) become a line feed, and the separator of units becomes a space. If they were deleted, words would be
# joined.
_BREAKS = bytes.maketrans(b"\x0b\x0c\x1c\x1d\x1e\x1f", b"\n\n\n\n\n ")
_NEXT_LINE = b"\xc2\x85"
# Other control characters except tab, line feed and the separator's \0 are deleted: C0 and DEL; C1 in UTF-8.
_ASCII_CONTROL = bytes([*range(1, 9), *range(13, 28), 127])
_C1_CONTROL = re.compile(b"\xc2[\x80-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_SPACE = re.compile(r"(?<!\s)(\s{1000})\s+")
_TEN_SPACES = re.compile(r"\s{10}")
# Every combining mark.
_MARK = "[" + "".join(filter(unicodedata.combining, map(chr, range(0x300, 0x1E94B)))) + "]"
_LONG_MARKS = re.compile(f"({_MARK}{{1000}}){_MARK}+")
_TEN_MARKS = re.compile(f"{_MARK}{{10}}")


def clean(
    texts: Sequence[str | Rejected], params: CollectParams, *, keep_trailing_spaces: bool = False
) -> list[str | Rejected]:
    """For each text, the clean text or why it is rejected; a text that was rejected before stays rejected.

    A clean text is in Unicode NFC, with line feeds as line ends, and without byte order mark, control
    characters, boilerplate lines and, unless `keep_trailing_spaces`, spaces and tabs at the ends of lines.
    Whitespace and combining marks are limited to 1,000 in a row: a million whitespace characters overflow the
    stack of tiktoken's matcher, and NFC is quadratic in the number of marks. Reasons for rejection:
    `lone_surrogates` (they have no UTF-8 form), `empty`, `too_short`, or a filter's name.

    Texts are joined for the steps that visit each character, because one call for each short text costs several
    times as much.
    """
    try:
        stripped = iter(_strip([text for text in texts if isinstance(text, str)], keep_trailing_spaces))
    except UnicodeEncodeError:
        lone = Rejected("lone_surrogates")
        checked = [lone if isinstance(text, str) and _SURROGATE.search(text) else text for text in texts]
        return clean(checked, params, keep_trailing_spaces=keep_trailing_spaces)
    filters = params.filters if are_on(params.filters) else None
    at_end = "\n" if keep_trailing_spaces else "\n\t "
    return [
        text
        if isinstance(text, Rejected)
        else _normalize(next(stripped), params.min_document_bytes, filters, at_end)
        for text in texts
    ]


def _strip(texts: list[str], keep_trailing_spaces: bool) -> list[str]:
    """The texts without byte order marks, control characters, and maybe spaces at the ends of lines.

    Raises UnicodeEncodeError if a text has a lone surrogate.
    """
    joined = _SEPARATOR.join(["", *texts])
    if joined.count("\0") > len(texts):  # a text contains \0: replace it by another control character
        joined = _SEPARATOR.join(["", *(text.replace("\0", "\1") for text in texts)])
    content = plain_line_ends(joined.replace("\0\n\ufeff", "\0\n")).encode().translate(_BREAKS, _ASCII_CONTROL)
    if not content.isascii():
        content = _C1_CONTROL.sub(b"", content.replace(_NEXT_LINE, b"\n"))
    joined = content.decode()
    if keep_trailing_spaces:
        return joined.split("\0")[1:]
    if " \n" in joined or "\t\n" in joined or joined.endswith((" ", "\t")):
        joined = "\n".join([line.rstrip(" \t") for line in joined.split("\n")])
    return joined.split("\0")[1:]


def _normalize(text: str, min_bytes: int, filters: FilterParams | None, at_end: str) -> str | Rejected:
    """The steps that need a text of its own, and the checks. `at_end`: characters that no text ends with."""
    text = text.lstrip("\n\ufeff").rstrip("\n")
    if not text.isascii():
        text = _without_long_marks(
            unicodedata.normalize("NFC", _without_long_marks(text))
        )  # NFC can double their number
    if filters:
        text, emptied_by = without_boilerplate(text, filters)
        if emptied_by:
            return Rejected(emptied_by, "drops each line")
    if len(text) > 1000 and _TEN_SPACES.search(text[::100]):
        text = _LONG_SPACE.sub(r"\1", text).rstrip(at_end)  # the cut may leave them at the end
    if not text or text.isspace():
        return Rejected("empty")
    if len(text) < min_bytes and len(text.encode()) < min_bytes:
        return Rejected("too_short", f"{len(text.encode())} bytes, allowed is at least {min_bytes}")
    failed = fault(text, filters) if filters else None
    return Rejected(*failed) if failed else text


def _without_long_marks(text: str) -> str:
    """The text with at most 1,000 combining marks in a row."""
    if len(text) > 1000 and _TEN_MARKS.search(text[::100]):  # 1,000 in a row contain 10 of these characters
        return _LONG_MARKS.sub(r"\1", text)
    return text


def plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def cut_text(text: str, max_bytes: int) -> list[str]:
    """As `cut`; each piece but the first is marked as one, and so is the first if the text is."""
    first, *others = cut(text, max_bytes) or [text]
    return [Piece(first) if isinstance(text, Piece) else first, *map(Piece, others)]


def cut(text: str, max_bytes: int) -> list[str]:
    """The text in pieces of at most `max_bytes` UTF-8 bytes, cut after a line if one ends in the second half.

    If more text follows later, join the last piece to it and cut again.
    """
    pieces: list[str] = []
    start = 0
    while start < len(text):
        # A character has at least one byte, so no piece has more than max_bytes characters.
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

"""Which encoding a file has, if it is not UTF-8."""

import codecs

from gptpipe.shell.errors import InputError

_SAMPLE_BYTES = 4096  # of a file, which show its encoding
# Bytes that are in no text of an 8-bit encoding.
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\x0b\x0c\r\x1b"))
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Where text in Latin letters has zeros, in groups of four bytes.
_PLACES_OF_ZEROS = (
    ("utf-32-le", (1, 2, 3)),
    ("utf-32-be", (0, 1, 2)),
    ("utf-16-le", (1, 3)),
    ("utf-16-be", (0, 2)),
)


def not_utf8(name: str, offset: int, content: bytes = b"") -> InputError:
    """The error for bytes that are not UTF-8. `content` are bytes of the file, from its start if possible."""
    problem = f"{name}: not UTF-8 at byte {offset}"
    if encoding := wide_encoding(content):
        return InputError(
            f"{problem}; it is {encoding.upper()}: set encoding: {encoding} of the source, or convert it"
        )
    sample = content[:_SAMPLE_BYTES]
    if len(sample.translate(None, _CONTROLS)) < 0.97 * len(sample):
        return InputError(f"{problem}; it looks compressed or binary: unpack, convert or remove it")
    fix = (
        "set encoding of the source (such as cp1252), convert the file, "
        "or set collect.encoding_errors to replace"
    )
    return InputError(f"{problem}; {fix}")


def marked_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, if the content starts with their byte order mark."""
    return next((encoding for mark, encoding in _MARKS if content.startswith(mark)), None)


def wide_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, if a byte order mark or the places of the zeros show it."""
    if encoding := marked_encoding(content):
        return encoding
    sample = content[:_SAMPLE_BYTES]
    if b"\0" not in sample or len(sample) < 8:
        return None
    # Share of zeros at each place of four.
    zeros = [sample[i::4].count(0) / len(sample[i::4]) for i in range(4)]
    for wide, places in _PLACES_OF_ZEROS:
        if min(zeros[place] for place in places) > 0.5:
            return wide
    return None

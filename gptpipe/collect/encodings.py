"""Which encoding a file has, if it is not UTF-8."""

import codecs

from gptpipe.shell.errors import InputError

SAMPLE_BYTES = 4096  # of a file, which show its encoding
_FEW = 0.1  # share of characters that may be replaced; more make a text unreadable
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
    if looks_binary(content):
        return InputError(f"{problem}; it looks compressed or binary: unpack, convert or remove it")
    sample = content[:SAMPLE_BYTES].decode(errors="replace")
    if sample.count("\ufffd") > _FEW * len(sample):
        fix = "set encoding of the source (such as cp1252 or koi8-r), or convert the file"
    else:
        fix = (
            "set encoding of the source (such as cp1252), convert the file, "
            "or set collect.encoding_errors to replace"
        )
    return InputError(f"{problem}; {fix}")


def looks_binary(content: bytes) -> bool:
    """Whether the content has more control characters than a text of any encoding of single bytes."""
    sample = content[:SAMPLE_BYTES]
    return len(sample.translate(None, _CONTROLS)) < 0.97 * len(sample)


def marked_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, if the content starts with their byte order mark."""
    return next((encoding for mark, encoding in _MARKS if content.startswith(mark)), None)


def wide_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, if a byte order mark or the places of the zeros show it."""
    if encoding := marked_encoding(content):
        return encoding
    sample = content[:SAMPLE_BYTES]
    if b"\0" not in sample or len(sample) < 8:
        return None
    # Share of zeros at each place of four.
    zeros = [sample[i::4].count(0) / len(sample[i::4]) for i in range(4)]
    for wide, places in _PLACES_OF_ZEROS:
        if min(zeros[place] for place in places) > 0.5:
            text = sample.decode(wide, errors="ignore")
            return None if looks_binary(text.encode()) else wide  # arrays of numbers have such zeros, too
    return None

"""Texts on which two programs that share a vocabulary are most likely to give different token ids."""

import unicodedata
from collections.abc import Iterator

from gptpipe.formats.tokenizer import END_OF_TEXT

_PLANE_STEP = 61  # every 61st code point: a prime, so that no block of characters is left out
_CHARACTERS_PER_TEXT = 2048

_SPACES = (
    " ",
    "  leading",
    "trailing  ",
    "\n",
    "a\n\n b",
    " \n \n\n  x",
    "\r\n\r\n a\r",
    "tab\t\ttab \t",
    "\u00a0\u3000\u2003x",
)
_WORDS = (
    "it's I'LL don't we'Ve 'tis '",
    "naïve CAFÉ camelCase École",
    "ǅ ʰ ﬁ ß İ \u0131",
    "漢字かな交じり文 한국어 ไทย",
    "👩‍👩‍👧‍👦🇩🇪\ufe0f",
)
_MARKS = (
    "e\u0301 \u0301x \u0308\n\u0308",
    "हिन्दी में २3",
    "កម្ពុជា မြန်မာ ไทย\u0e31",
    "Z\u0351\u036b\u0343a\u035cl\u0321\u0353g\u033bo\u031b",
)
_NUMBERS = ("0123456789 3.14 1,000,000", "1" * 70, "½ ²³ ⅷ ٣٤٥ \uff11\uff12\uff13", "v1.2.3-rc4 0x1F 1e-5")
_CODE = (
    "def f(x: int) -> str:\n\treturn f'{x!r}'  # one\n\n\n",
    "#include <a.h>\r\nint main(){return a[i]->b++ || !c;}\r\n",
    '{"key": [1, null, true]}',
    "__init__ != !!! ... … — $a_b;",
)
_SPECIAL = (
    END_OF_TEXT,
    f"a{END_OF_TEXT}b {END_OF_TEXT}\n",
    "<|endoftext",
    "<|im_start|>user<|im_end|>",
    "<s></s>[INST]<0x0A>",
)
_INVALID = tuple(
    sequence.decode(errors="replace")
    for sequence in (b"a\xff\xfeb", b"\xe2\x82 \xf0\x9f\x99", b"\xc0\xaf\xed\xa0\x80")
)
_CONTROLS = ("\x00\x01\x7f\x85", "\ufeffx\u200b\u200d", "a\u2028b\u2029c\x0bd\x0ce\x1c")


def difficult_texts() -> Iterator[str]:
    """White space, combining marks, numbers, code, text like special tokens, and all Unicode planes."""
    texts = (*_SPACES, *_WORDS, *_MARKS, *_NUMBERS, *_CODE, *_SPECIAL, *_INVALID, *_CONTROLS)
    yield from texts
    yield "\n".join(texts)
    yield "a" * 300 + " " * 300 + "." * 300
    characters = [chr(code) for code in range(0, 0x110000, _PLANE_STEP) if _is_old(chr(code))]
    for start in range(0, len(characters), _CHARACTERS_PER_TEXT):
        part = characters[start : start + _CHARACTERS_PER_TEXT]
        yield "".join(part)
        yield "".join(f"a{character} {character}1" for character in part)


def _is_old(character: str) -> bool:
    """Whether the character is in Unicode 3.2, which is part of every Python.

    Programs with older tables of Unicode know no newer characters, and cut text at them differently.
    """
    return unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs")

"""Texts in JSON lines: one JSON object in each line (https://jsonlines.org)."""

import json
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from gptpipe.collect.encodings import not_utf8, wide_encoding
from gptpipe.collect.keys import MISSING, paths_of_keys, value_at
from gptpipe.collect.params import CollectParams
from gptpipe.collect.tables import CHUNK
from gptpipe.collect.texts import Rejected, Texts

_LINE_BYTES = 64 << 20  # of a line, and 16 times `max_document_bytes` more; it is in memory as a whole
_MAX_KEYS = 10  # of an object, in a message
_LINE_ENDS = ("\n", "\r\n")
_AROUND_VALUES = " \t\r\n\x1e"  # white space, and what starts a record in a JSON text sequence (RFC 7464)
_JSON = json.JSONDecoder(parse_int=float)  # Python refuses to convert integers of more than 4,300 digits


def jsonl_texts(
    name: str, file: BinaryIO, start: int, key: str, params: CollectParams, *, is_whole: bool = True
) -> Texts:
    """One text for each line that is not blank; about a chunk of the file in a list.

    `start` is the byte of the file where `file` begins. Above 0, line numbers are unknown, and messages name
    bytes. A whole file in which no object has the key ends with a bad record.
    """
    max_line_bytes = _LINE_BYTES + 16 * params.max_document_bytes
    texts: list[str | Rejected] = []
    keys = _Keys(key)
    number = 0  # of the line
    offset = next_yield = start  # byte after the line; byte after which a list is yielded
    while line := file.readline(max_line_bytes):
        number += 1
        offset += len(line)
        text: str | Rejected | None = _plain_text(line, key)
        if text is not None:
            keys.is_found = keys.has_value = True
        else:
            place = _Place(name, number, offset - len(line), is_numbered=start == 0)
            if len(line) == max_line_bytes and not line.endswith(b"\n"):
                offset += _skip_line(file)
                text = Rejected("line_too_long", f"{place}: more than {max_line_bytes:,} bytes; split it")
            else:
                text = _any_text(line, place, keys, params.encoding_errors)
        if text is not None:
            texts.append(text)
        if offset >= next_yield:
            yield texts
            texts, next_yield = [], offset + CHUNK
    yield texts
    if is_whole and keys.others and not keys.is_found:
        problem = f"no line has the key `{key}`; the keys are {', '.join(keys.others)}"
        yield [Rejected("no_key", f"{name}: {problem}; set text_key of the source")]


def _plain_text(line: bytes, key: str) -> str | None:
    """The text of a usual line: an object in UTF-8 with a text at the key. None for any other line.

    Nearly all lines are usual, so this function decides how fast a file is read.
    """
    try:
        content = line.decode()
        value, end = _JSON.raw_decode(content)
        text = value[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return text if type(text) is str and content[end:] in _LINE_ENDS else None


class _Place(NamedTuple):
    """A line of a file, for a message."""

    name: str
    number: int
    offset: int  # bytes
    is_numbered: bool

    def __str__(self) -> str:
        return (
            f"{self.name}, line {self.number}"
            if self.is_numbered
            else f"{self.name}, the line at byte {self.offset}"
        )


@dataclass
class _Keys:
    """The key of the text, and what a file has instead."""

    wanted: str  # a key, or a path of keys with dots between
    is_found: bool = False  # in any line
    has_value: bool = False  # whether a line before had any content
    others: dict[str, None] = field(default_factory=dict)  # the first keys of objects without it, in order


def _any_text(line: bytes, place: _Place, keys: _Keys, errors: str) -> str | Rejected | None:
    """The text of a line, or why there is none; None for a blank line."""
    try:
        content = line.decode(errors=errors).removeprefix("\ufeff").strip(_AROUND_VALUES)
        if not content:
            return None
        value, end = _JSON.raw_decode(content)
        if end < len(content):
            raise ValueError(f"more text after its end, character {end}")
    except UnicodeDecodeError as error:
        return Rejected("not_utf8", str(not_utf8(place.name, place.offset + error.start, line)))
    except (ValueError, RecursionError) as error:
        return _not_json(line, content, place, keys, str(error))
    is_first, keys.has_value = place.is_numbered and not keys.has_value, True
    if is_first and isinstance(value, list):
        return _array(place)
    text = value_at(value, keys.wanted)
    if isinstance(text, str):
        keys.is_found = True
        return text
    if text is not MISSING:
        keys.is_found = True
        return Rejected("no_text", f"{place}: `{keys.wanted}` is {_kind(text)}")
    if not isinstance(value, dict):
        return Rejected("no_text", f"{place}: {_kind(value)}, not an object with the key `{keys.wanted}`")
    first_keys = list(islice(paths_of_keys(value), _MAX_KEYS))
    if len(keys.others) < _MAX_KEYS:
        keys.others |= dict.fromkeys(first_keys)
    return Rejected(
        "no_text", f"{place}: no key `{keys.wanted}`; the keys are {', '.join(first_keys) or 'none'}"
    )


def _not_json(line: bytes, content: str, place: _Place, keys: _Keys, error: str) -> Rejected:
    """What a line is that cannot be parsed. JSON that is not one object per line has as many bad lines."""
    is_first, keys.has_value = place.is_numbered and not keys.has_value, True
    if is_first and wide_encoding(line):
        return Rejected("not_utf8", str(not_utf8(place.name, place.offset, line)))
    if is_first and content.startswith("["):
        return _array(place)
    if is_first and content == "{":
        problem = f"{place.name}: a JSON object over several lines, not one JSON object per line"
        return Rejected("not_json", f"{problem}; convert it, for example with `jq -c .`")
    return Rejected("not_json", f"{place}: not JSON: {error}; fix or remove the line")


def _array(place: _Place) -> Rejected:
    problem = f"{place.name}: a JSON array, not one JSON object per line"
    return Rejected("not_json", f"{problem}; convert it, for example with `jq -c '.[]'`")


def _kind(value: Any) -> str:
    """What a value is instead of a text, in the words of JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return "a string" if isinstance(value, str) else "a number"


def _skip_line(file: BinaryIO) -> int:
    """Read the rest of a line; returns its bytes."""
    n_bytes = 0
    while chunk := file.readline(CHUNK):
        n_bytes += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return n_bytes

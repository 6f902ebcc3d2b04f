"""Texts in JSON lines: one JSON object in each line (https://jsonlines.org)."""

import json
from typing import Any, BinaryIO, NamedTuple

from gptpipe.collect.encodings import not_utf8
from gptpipe.collect.params import CollectParams
from gptpipe.collect.tables import CHUNK
from gptpipe.collect.texts import Rejected, Texts

_LINE_BYTES = 64 << 20  # of a line, and 16 times `max_document_bytes` more; it is in memory as a whole
_MAX_KEYS = 10  # of an object, in a message
_JSON = json.JSONDecoder(parse_int=float)  # Python refuses to convert integers of more than 4,300 digits


def jsonl_texts(
    name: str, file: BinaryIO, start: int, key: str, params: CollectParams, *, is_whole: bool = True
) -> Texts:
    """One text for each line that is not blank; about a chunk of the file in a list.

    `start` is the byte of the file where `file` begins. Above 0, line numbers are unknown, and messages name bytes.
    A whole file in which no object has the key ends with a bad record.
    """
    max_line_bytes = _LINE_BYTES + 16 * params.max_document_bytes
    path = key.split(".")
    texts: list[str | Rejected] = []
    other_keys: dict[str, None] = {}  # of objects without the key, in order
    has_key = False
    number = 0  # of the line
    offset = next_yield = start  # byte of the line; byte after which a list is yielded
    while line := file.readline(max_line_bytes):
        number += 1
        place = _Place(name, number, offset, is_numbered=start == 0)
        offset += len(line)
        if len(line) == max_line_bytes and not line.endswith(b"\n"):
            offset += _skip_line(file)
            texts.append(Rejected("line_too_long", f"{place}: more than {max_line_bytes:,} bytes; split it"))
            continue
        value = _parse_line(line, place, params.encoding_errors)
        if isinstance(value, Rejected):
            texts.append(value)
        elif value is not _BLANK:
            text = _value_at(value, key, path)
            has_key = has_key or text is not _MISSING
            if text is _MISSING and isinstance(value, dict) and len(other_keys) < _MAX_KEYS:
                other_keys |= dict.fromkeys(list(value)[:_MAX_KEYS])
            texts.append(text if isinstance(text, str) else _without_text(text, value, place, key))
        if offset >= next_yield:
            yield texts
            texts, next_yield = [], offset + CHUNK
    yield texts
    if is_whole and other_keys and not has_key:
        problem = f"no line has the key `{key}`; the keys are {', '.join(other_keys)}"
        yield [Rejected("no_key", f"{name}: {problem}; set text_key of the source")]


class _Place(NamedTuple):
    """A line of a file, for a message."""

    name: str
    number: int
    offset: int  # bytes
    is_numbered: bool

    def __str__(self) -> str:
        return (
            f"{self.name}, line {self.number}" if self.is_numbered else f"{self.name}, the line at byte {self.offset}"
        )


_BLANK = object()  # a line without content
_MISSING = object()  # the value of a key that an object does not have


def _parse_line(line: bytes, place: _Place, errors: str) -> Any:
    """The JSON value of a line, _BLANK, or why it is bad."""
    try:
        content = line.decode(errors=errors).removeprefix("\ufeff").strip(" \t\r\n")
        if not content:
            return _BLANK
        value, end = _JSON.raw_decode(content)
        if end < len(content):
            raise ValueError(f"more text after its end, character {end}")
    except UnicodeDecodeError as error:
        return Rejected("not_utf8", str(not_utf8(place.name, place.offset + error.start, line)))
    except (ValueError, RecursionError) as error:
        is_array = place.is_numbered and place.number == 1 and content.startswith("[")
        return (
            _array(place) if is_array else Rejected("not_json", f"{place}: not JSON: {error}; fix or remove the line")
        )
    is_array = place.is_numbered and place.number == 1 and isinstance(value, list)
    return _array(place) if is_array else value


def _without_text(text: Any, value: Any, place: _Place, key: str) -> Rejected:
    """The rejection of a line whose value has no text at the key."""
    if text is not _MISSING or not isinstance(value, dict):
        return Rejected("no_text", str(place))
    keys = ", ".join(list(value)[:_MAX_KEYS]) or "none"
    return Rejected("no_text", f"{place}: no key `{key}`; the keys are {keys}")


def _array(place: _Place) -> Rejected:
    problem = f"{place.name}: a JSON array, not one JSON object per line"
    return Rejected("not_json", f"{problem}; convert it, for example with `jq -c '.[]'`")


def _value_at(value: Any, key: str, path: list[str]) -> Any:
    """The value of a key, or of the last key of a path of keys; _MISSING if there is none."""
    if isinstance(value, dict) and key in value:
        return value[key]
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _skip_line(file: BinaryIO) -> int:
    """Read the rest of a line; returns its bytes."""
    n_bytes = 0
    while chunk := file.readline(CHUNK):
        n_bytes += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return n_bytes

"""Keys of objects in objects: `a.b` is the key `b` of the object at key `a`."""

from collections.abc import Iterator
from typing import Any

_MAX_DEPTH = 4  # of objects in objects whose keys are listed
MISSING = object()  # the value of a key that an object does not have


def value_at(value: Any, key: str) -> Any:
    """The value of a key, or of the last key of a path of keys; MISSING if there is none.

    A key may contain a dot: `a.b.c` may be the key `c` of the object at the key `a.b`.
    """
    if not isinstance(value, dict):
        return MISSING
    if key in value:
        return value[key]
    for dot in (i for i, character in enumerate(key) if character == "."):
        found = value_at(value.get(key[:dot]), key[dot + 1 :])
        if found is not MISSING:
            return found
    return MISSING


def paths_of_keys(value: dict[str, Any], depth: int = _MAX_DEPTH) -> Iterator[str]:
    """The keys of an object; for a key with an object, the keys of that, as in `a.b`."""
    for key, child in value.items():
        if isinstance(child, dict) and child and depth:
            yield from (f"{key}.{path}" for path in paths_of_keys(child, depth - 1))
        else:
            yield key

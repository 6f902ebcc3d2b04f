"""Ways to damage a file, as a disk, a failed copy or a person does."""

import json
import random
import re
import shutil
from pathlib import Path

WAYS = ("flip", "cut", "empty", "zeros", "swap", "stale", "gone", "extra", "edit")


def damage(path: Path, way: str, chance: random.Random, older: Path | None = None) -> bool:
    """Damage the file in one of `WAYS`; returns whether its folder has changed.

    flip: one bit. cut: truncated. empty: no content. zeros: a block that was never written. swap: exchanged
    with another file of its folder. stale: the file `older`, which has the same name in another run. gone:
    removed. extra: a copy beside it under another name. edit: one digit of a text is changed, and the text
    stays well-formed.
    """
    content = path.read_bytes()
    changed = content
    match way:
        case "flip" if content:
            place = chance.randrange(len(content))
            changed = (
                content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
            )
        case "cut" if content:
            changed = content[: chance.randrange(len(content))]
        case "empty":
            changed = b""
        case "zeros" if content:
            start = chance.randrange(len(content))
            n_zeros = min(512, len(content) - start)
            changed = content[:start] + bytes(n_zeros) + content[start + n_zeros :]
        case "swap":
            others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
            if not others:
                return False
            other = chance.choice(others)
            changed = other.read_bytes()
            other.write_bytes(content)
        case "stale":
            if older is None or not older.is_file():
                return False
            changed = older.read_bytes()
        case "gone":
            path.unlink()
            return True
        case "extra":
            shutil.copy(path, path.with_name(f"copy-of-{path.name}"))
            return True
        case "edit":
            changed = _with_another_number(content, path.suffix, chance)
    path.write_bytes(changed)
    return changed != content


def _with_another_number(content: bytes, suffix: str, chance: random.Random) -> bytes:
    """The text with one digit changed; in a manifest, this is in `counts`, `made_from` or a digest."""
    if suffix not in (".json", ".csv", ".jsonl"):
        return content
    digits = [match.start() for match in re.finditer(rb"[0-9]", content)]
    if not digits:
        return content
    place = chance.choice(digits)
    digit = chance.choice([d for d in b"123456789" if d != content[place]])
    changed = content[:place] + bytes([digit]) + content[place + 1 :]
    if suffix == ".json":
        json.loads(changed)  # still valid JSON, so a parser does not detect it
    return changed

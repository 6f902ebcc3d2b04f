"""Durable single files: every byte that the project writes to disk goes through here.

A file appears under its final name only when it is complete and on disk (temporary name in the same folder, flush,
fsync, rename, fsync of the folder).
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from gptpipe.shell.locks import disk_errors, make_folder, sync_folder

Model = TypeVar("Model", bound=BaseModel)


def to_json(value: Any) -> bytes:
    """The one JSON form used on disk: sorted keys, two spaces, no NaN, a line feed at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def seal(content: dict[str, Any]) -> bytes:
    """JSON of `content` that also contains its own SHA-256, so `unseal` notices any change, such as a flipped bit."""
    return to_json({**content, "sha256": hashlib.sha256(to_json(content)).hexdigest()})


def unseal(data: bytes) -> dict[str, Any]:
    """The content of what `seal` returned. Raises ValueError if any byte is different."""
    try:
        content: dict[str, Any] = json.loads(data)
        del content["sha256"]
        is_unchanged = seal(content) == data
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a sealed JSON object") from error
    if not is_unchanged:
        raise ValueError("changed after it was written")
    return content


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file whose size is limited. Raises OSError, and ValueError for any other file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"{status.st_size:,} bytes, the limit is {max_bytes:,}")
    return path.read_bytes()


def read_json(path: Path, kind: type[Model], max_bytes: int) -> Model:
    """A JSON file as an object of `kind`, types taken strictly. Raises OSError, and ValueError of one short line."""
    try:
        return kind.model_validate_json(read_bytes(path, max_bytes), strict=True)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error


def first_fault(error: ValidationError) -> str:
    """What is wrong with the first wrong value, in one short line; its place may be a key from the file."""
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    return f"{place!r:.100}: {fault['msg']:.200}" if place else f"{fault['msg']:.200}"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(path: Path, n_bytes: int = 0) -> Iterator[BinaryIO]:
    """Write a file that appears whole under `path`, or not at all; `n_bytes` is its size if known.

    Raises ResourceError.
    """
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        make_folder(path.parent)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                written = partial.stat().st_size if partial.exists() else 0
                if n_bytes or written:
                    needed = f"{n_bytes:,}" if n_bytes else f"more than {written:,}"
                    error.strerror = f"{error.strerror} (it needs {needed} bytes)"
            partial.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    with new_file(path, len(content)) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, to_json(value))

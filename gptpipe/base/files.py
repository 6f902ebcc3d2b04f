"""Durable single files. The project writes every file through this module.

A file gets its final name only when it is complete and on disk: temporary name in the same folder, flush,
fsync, rename, fsync of the folder.
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
    """The JSON form of all files: sorted keys, an indent of two spaces, no NaN, a line feed at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def seal(content: dict[str, Any]) -> bytes:
    """JSON of `content` and its SHA-256, so that `unseal` detects any change, such as a flipped bit."""
    return to_json({**content, "sha256": hashlib.sha256(to_json(content)).hexdigest()})


def unseal(data: bytes) -> dict[str, Any]:
    """The content that was passed to `seal`. Raises ValueError if any byte of the JSON has changed."""
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
    """The content of a file. Raises OSError; ValueError if it is no regular file or larger than `max_bytes`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"{status.st_size:,} bytes, the limit is {max_bytes:,}")
    return path.read_bytes()


def read_json(path: Path, kind: type[Model], max_bytes: int) -> Model:
    """Read a JSON file as an object of `kind`, with strict types.

    Raises OSError, or ValueError of one short line.
    """
    try:
        return kind.model_validate_json(read_bytes(path, max_bytes), strict=True)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error


def first_fault(error: ValidationError) -> str:
    """The first error of a validation in one short line: its key, maybe from the file, and the reason."""
    fault = error.errors()[0]
    key = ".".join(map(str, fault["loc"]))
    return f"{key!r:.100}: {fault['msg']:.200}" if key else f"{fault['msg']:.200}"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(path: Path, n_bytes: int = 0) -> Iterator[BinaryIO]:
    """Write a file that appears under `path` only if it is complete. `n_bytes` is its size, if known.

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

"""Operations that the tracking store has not taken yet, in `.gptpipe/outbox/STORE/`, a file per run.

STORE is the digest of the store's name, which `store.txt` contains. The next command that logs to this store
sends the operations. Files directly in `.gptpipe/outbox/` belong to no store and are sent to the next one.

What can never be sent does not block the rest. It is moved to a file beside it, which a warning names:
`RUN.jsonl.damaged` contains lines that are not operations, `RUN.jsonl.refused` contains operations that the
store always refuses. Each line begins with a checksum, so that a flipped bit is noticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import Field, FiniteFloat, StringConstraints, TypeAdapter
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from gptpipe.base.files import write_bytes
from gptpipe.record.sqlite_store import sqlite_file
from gptpipe.record.store import RUN_ID, Operation, RefusedError, RunWriter, StoreError, without_credentials
from gptpipe.shell.console import complain, say
from gptpipe.shell.environment import SQLITE, experiment_name, project_root, tracking_uri
from gptpipe.shell.errors import ResourceError, first_line

# The operations of `RunWriter.write`, as lines of a file. Whole numbers fit into the store's columns.
_Name = Annotated[str, StringConstraints(min_length=1, max_length=250)]
_ArtifactPath = Annotated[str, StringConstraints(pattern=r"^[\w-][\w. -]*(/[\w-][\w. -]*)*$", max_length=250)]
_Whole = Annotated[int, Field(ge=0, lt=2**53)]
_Texts = dict[_Name, str]


class _Dataset(TypedDict):
    """A data set of a run."""

    name: _Name
    digest: _Name
    source_type: _Name
    source: _Name
    profile: str


class _Description(TypedDict):
    """The content of `create`: the result of `describe_run`."""

    name: str | None
    tags: _Texts
    params: _Texts
    datasets: list[_Dataset]
    texts: dict[_ArtifactPath, str]


_STORE_FILE = "store.txt"
_OPERATION: TypeAdapter[Operation] = TypeAdapter(
    tuple[Literal["create"], _Description]
    | tuple[Literal["metrics"], list[tuple[_Name, FiniteFloat, _Whole, _Whole]]]
    | tuple[Literal["text"], tuple[_ArtifactPath, str]]
    | tuple[Literal["tags"], _Texts]
    | tuple[Literal["end"], Literal["FINISHED", "FAILED", "KILLED"]]
)


def outbox_folder() -> Path:
    """The folder of the current store."""
    return _outbox() / hashlib.sha256(store_name().encode()).hexdigest()[:12]


def _outbox() -> Path:
    return project_root() / ".gptpipe" / "outbox"


def store_name() -> str:
    """The experiment and the store to which records are sent now.

    A SQLite store inside the project is named by its path there, so that its records stay with it after a move.
    """
    uri = tracking_uri()
    file = sqlite_file(uri)
    if file is None:
        address = without_credentials(uri).rstrip("/")
    else:
        root = project_root().resolve()
        path = file.resolve()
        address = f"{SQLITE}{path.relative_to(root) if path.is_relative_to(root) else path}"
    return f"experiment {experiment_name()} in {address}"


def other_stores() -> dict[str, list[Path]]:
    """The files that wait for other stores than the current one, by the name of their store."""
    stores: dict[str, list[Path]] = {}
    for path in sorted(_outbox().glob("*/*.jsonl")):
        if path.parent != outbox_folder():
            name_file = path.with_name(_STORE_FILE)
            name = name_file.read_text(errors="replace").strip() if name_file.exists() else path.parent.name
            stores.setdefault(name, []).append(path)
    return stores


def current_files(pattern: str) -> list[Path]:
    """The files for the current store, and those for any store."""
    return sorted([*_outbox().glob(pattern), *outbox_folder().glob(pattern)])


def keep(path: Path, operations: list[Operation]) -> bool:
    """Append operations to a file of the outbox.

    Returns whether they are on disk; a full disk stops no training.
    """
    if not operations:
        return True
    try:
        earlier = path.read_bytes() if path.exists() else b""  # of the same run, before it was resumed
        write_bytes(path, earlier + _to_lines(operations))
        if path.parent == outbox_folder():
            write_bytes(path.with_name(_STORE_FILE), f"{store_name()}\n".encode())
    except (OSError, ResourceError) as error:
        complain(f"warning: {len(operations)} records of this run are lost: {first_line(error)}")
        return False
    return True


def send_outbox() -> None:
    """Send what earlier runs could not send to this store. If it fails, the rest waits for the next command."""
    outbox = _outbox()
    try:
        with FileLock(outbox.with_suffix(".lock"), timeout=0):
            for path in current_files("*.jsonl"):
                if not _send_file(path):
                    return
    except Timeout:  # another process is sending
        return
    except OSError as error:
        complain(
            f"warning: {outbox}: {error.strerror or error}; make it readable and writable to send what waits"
        )


def _send_file(path: Path) -> bool:
    """Send the operations of one run, then remove their file. Returns False if the store does not answer."""
    content = path.read_bytes()
    if not content:
        complain(f"warning: {path}: it is empty, so records of this run are lost; the file is removed")
    operations, damaged = (
        _parse(content) if RUN_ID.fullmatch(path.stem) else ([], content.splitlines(keepends=True))
    )
    writer = RunWriter(path.stem)
    refused: list[Operation] = []
    reason: StoreError | None = None
    for operation in operations:
        try:
            writer.write(operation)
        except RefusedError as error:
            refused.append(operation)
            reason = error
        except StoreError as error:
            complain(f"warning: {path} waits for the tracking store ({error})")
            return False
    _set_aside(path, "damaged", b"".join(damaged), f"{len(damaged)} lines are not records of a run")
    _set_aside(path, "refused", _to_lines(refused), f"{len(refused)} records are refused ({reason})")
    if path.read_bytes() == content:  # otherwise a training has added to it meanwhile
        path.unlink()
    n_sent = len(operations) - len(refused)
    if n_sent:
        say(f"tracking: sent {n_sent} records of run {writer.run_id} that were in the outbox")
    return True


def _set_aside(path: Path, kind: str, content: bytes, reason: str) -> None:
    """Keep what can never be sent in a file beside `path`, and warn."""
    if content:
        aside = path.with_name(f"{path.name}.{kind}")
        write_bytes(aside, content)
        complain(f"warning: {path}: {reason}; they are kept in {aside}, remove it if they are not needed")


def _parse(content: bytes) -> tuple[list[Operation], list[bytes]]:
    """The operations in a file of the outbox, and the lines that are not operations."""
    operations: list[Operation] = []
    damaged: list[bytes] = []
    for line in content.splitlines(keepends=True):
        operation = line.partition(b" ")[2].rstrip(b"\n")
        try:
            if line.rstrip(b"\n") != with_checksum(operation):
                raise ValueError("changed after it was written")
            operations.append(_OPERATION.validate_json(operation, strict=True))
        except ValueError:  # pydantic's too
            damaged.append(line)
    return operations, damaged


def _to_lines(operations: list[Operation]) -> bytes:
    return b"".join(with_checksum(json.dumps(operation).encode()) + b"\n" for operation in operations)


def with_checksum(operation: bytes) -> bytes:
    """A line of an outbox file: 16 hex digits of the operation's SHA-256, a space, the operation as JSON."""
    return hashlib.sha256(operation).hexdigest()[:16].encode() + b" " + operation

"""A tracking store that is a SQLite database: its file, and the folder of artifacts beside it.

MLflow writes absolute locations of artifacts into the database. If a project is moved or copied, they still
name the old folder. This module updates them.
"""

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow.store.db.utils
from filelock import FileLock
from mlflow.tracking import MlflowClient
from sqlalchemy.engine import make_url

from gptpipe.shell.environment import SQLITE, project_root, sqlite_uri

VIEW_TAG = "mlflow.sharedViewState.figures"  # tag of the experiments that this project creates
_ARTIFACTS = "mlartifacts"  # folder beside the database, of experiments that this project creates
_FOLDERS = (_ARTIFACTS, "mlruns")  # the second is MLflow's default
_LOCKED_SECONDS = 5.0  # maximal wait for a database that another program has locked


def _create_no_folder(db_uri: str) -> None:
    """Replaces MLflow's function that creates the folder of a database.

    It does not decode the address: for `/a?b/x.db`, which is `/a%3Fb/x.db` there, it creates `/a%3Fb`.
    """


mlflow.store.db.utils._make_parent_dirs_if_sqlite = _create_no_folder

# Table, column, and whether the row belongs to an experiment of this project.
_OURS = f"SELECT experiment_id FROM experiment_tags WHERE key = '{VIEW_TAG}'"
_LOCATIONS = (
    ("experiments", "artifact_location", f"experiment_id IN ({_OURS})"),
    ("runs", "artifact_uri", f"experiment_id IN ({_OURS})"),
    ("logged_models", "artifact_location", f"experiment_id IN ({_OURS})"),
    *(
        ("model_versions", column, f"run_id IN (SELECT run_uuid FROM runs WHERE experiment_id IN ({_OURS}))")
        for column in ("storage_location", "source")
    ),
)


class Outdated(NamedTuple):
    """A location of artifacts in the database that names a folder in which the database no longer is."""

    table: str
    column: str
    row: int
    old: Path
    new: Path


def sqlite_file(uri: str) -> Path | None:
    """The database of an address, or None if it is the address of a server or of a database in memory."""
    if not uri.startswith(SQLITE):
        return None
    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None


@contextmanager
def store_lock(file: Path | None, name: str, timeout: float = -1) -> Iterator[None]:
    """Hold a lock of the store. It is beside the database, because several projects may share one.

    For a server (`file` is None), the lock is this project's. `timeout` is in seconds; -1 waits forever. Raises
    OSError.
    """
    folder, prefix = (file.parent, f"{file.name}.") if file else (project_root() / ".gptpipe", "")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{prefix}{name}.lock", timeout=timeout):
        yield


def create_store(file: Path) -> None:
    """Create MLflow's tables in a new file, and remove the partial files of killed attempts.

    Each attempt uses a new name: MLflow refuses partial tables forever, and this process keeps the file open.
    """
    for partial in file.parent.glob(f".{file.name}.*.partial*"):
        partial.unlink()
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    MlflowClient(sqlite_uri(partial))
    with closing(sqlite3.connect(partial)) as database:
        database.execute("PRAGMA journal_mode=WAL")  # readers such as the UI do not block the writer
    partial.replace(file)


def check_unlocked(file: Path) -> None:
    """Raises sqlite3.Error within seconds if the database is locked; MLflow would wait for minutes."""
    with closing(sqlite3.connect(file, timeout=_LOCKED_SECONDS)) as database:
        database.execute("BEGIN IMMEDIATE")


def artifacts_of(file: Path) -> str:
    """The location of the artifacts of new experiments, as a `file:` address."""
    return (file.resolve().parent / _ARTIFACTS).as_uri()


def is_moved(file: Path) -> bool:
    """Whether an experiment of this project would write artifacts to another place than beside the database."""
    return bool(outdated_locations(file, tables=("experiments",)))


def outdated_locations(file: Path, tables: tuple[str, ...] = ()) -> list[Outdated]:
    """The locations to update, of all tables or of some. Raises sqlite3.Error."""
    with closing(sqlite3.connect(file, timeout=_LOCKED_SECONDS)) as database:
        return _find_outdated(database, file, tables)


def update_locations(file: Path) -> int:
    """Update artifact locations in the database; returns how many were outdated. Raises sqlite3.Error."""
    with closing(sqlite3.connect(file, timeout=_LOCKED_SECONDS, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        outdated = _find_outdated(database, file)
        for table, column, row, _, new in outdated:
            database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new.as_uri(), row))
        database.execute("COMMIT")
    return len(outdated)


def _find_outdated(database: sqlite3.Connection, file: Path, tables: tuple[str, ...] = ()) -> list[Outdated]:
    known = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    folder = file.resolve().parent
    found: list[Outdated] = []
    for table, column, is_ours in _LOCATIONS:
        if table not in known or (tables and table not in tables):  # MLflow has not created its tables yet
            continue
        rows = database.execute(f"SELECT rowid, {column}, {is_ours} FROM {table} WHERE {column} IS NOT NULL")
        for row, location, ours in rows:
            old = _local_path(location)
            new = _beside(folder, old) if old else None
            if old and new and new != old and _has_moved(table, old, new, ours=bool(ours)):
                found.append(Outdated(table, column, row, old, new))
    return found


def _local_path(location: str) -> Path | None:
    """The path of a `file:` address or of a plain path; None for other locations, such as in a bucket."""
    if location.startswith("/"):
        return Path(location)
    parts = urlsplit(location)
    is_local = parts.scheme == "file" and parts.netloc in ("", "localhost")
    return Path(url2pathname(parts.path)) if is_local else None


def _beside(folder: Path, old: Path) -> Path | None:
    """Where artifacts of `old` are after the database moved to `folder`; None if they were not beside it."""
    names = [i for i, part in enumerate(old.parts) if part in _FOLDERS]
    return folder.joinpath(*old.parts[names[-1] :]) if names else None


def _has_moved(table: str, old: Path, new: Path, *, ours: bool) -> bool:
    """Whether `new` is the place where artifacts are, or where they will be written.

    A location that the user chose for an experiment changes only if the files are at the new place. An
    experiment of this project always writes beside its database; what earlier runs wrote may still be only at
    the old place.
    """
    if not ours:
        return new.exists()
    return table == "experiments" or new.exists() or not old.exists()

"""A project and its store, for each test its own."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import tiny
from mlflow.tracking import MlflowClient

from gptpipe.config import Params, load_params


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without an experiment of ours. Making one takes seconds, so tests share this one as a copy."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
    return path


@pytest.fixture(autouse=True)
def project(tmp_path: Path, fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with an empty store as the current folder; MLflow may not load pickles."""
    (tmp_path / ".dvc").mkdir()
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    return tmp_path


@pytest.fixture(scope="session")
def shipped() -> Params:
    """The params.yaml that ships, for fixtures of more than one test."""
    return load_params(Path(__file__).parents[2] / "params.yaml")


@pytest.fixture(scope="session")
def toy_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_split(tmp_path_factory.mktemp("toy"))

"""A project and its store, for each test its own."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project as the current folder; what MLflow loads may not be pickled."""
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    return tmp_path


@pytest.fixture(scope="session")
def toy_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_split(tmp_path_factory.mktemp("toy"))

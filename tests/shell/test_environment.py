"""Settings that change no result, read from the environment."""

import os
from pathlib import Path

import pytest

from gptpipe.shell.environment import experiment_name, n_workers, project_root, provenance, tracking_uri
from gptpipe.shell.errors import ConfigError


def test_the_root_is_the_nearest_parent_with_dvc_or_what_dvc_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "project" / "data" / "raw"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert project_root() == inner
    (tmp_path / "project" / ".dvc").mkdir()
    assert project_root() == tmp_path / "project"
    assert tracking_uri() == f"sqlite:///{tmp_path}/project/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert project_root() == tmp_path / "main"


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTPIPE_WORKERS")
    assert 1 <= n_workers() <= (os.cpu_count() or 1)
    monkeypatch.setenv("GPTPIPE_WORKERS", "7")
    assert n_workers() == 7


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", "²"])
def test_a_number_of_workers_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", text)
    with pytest.raises(ConfigError, match="GPTPIPE_WORKERS is"):
        n_workers()


def test_tracking_and_experiment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # outside git
    assert experiment_name() == "gptpipe"
    assert provenance() == {}
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("DVC_EXP_NAME", "swift-otter")
    assert experiment_name() == "mine"
    assert tracking_uri() == "http://localhost:5000"
    assert provenance() == {"dvc.exp_name": "swift-otter"}

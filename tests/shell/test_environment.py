"""Environment variables and their defaults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptpipe.shell.environment import (
    RankInfo,
    experiment_name,
    limit_busy_waiting,
    n_workers,
    project_root,
    provenance,
    rank_info,
    tracking_uri,
)
from gptpipe.shell.errors import ConfigError


def test_the_root_is_dvc_root_or_the_nearest_parent_with_a_dvc_folder(
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


def test_the_number_of_workers_is_the_variable_or_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTPIPE_WORKERS")
    assert 1 <= n_workers() <= (os.cpu_count() or 1)
    monkeypatch.setenv("GPTPIPE_WORKERS", "7")
    assert n_workers() == 7


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", "²"])
def test_an_invalid_number_of_workers_is_a_config_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", text)
    with pytest.raises(ConfigError, match="GPTPIPE_WORKERS is"):
        n_workers()


def test_tracking_variables_replace_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # outside git
    assert experiment_name() == "gptpipe"
    assert provenance() == {}
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("DVC_EXP_NAME", "swift-otter")
    assert experiment_name() == "mine"
    assert tracking_uri() == "http://localhost:5000"
    assert provenance() == {"dvc.exp_name": "swift-otter"}


def test_torchrun_sets_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert rank_info() == RankInfo(rank=0, n_ranks=1, local_rank=0, n_local_ranks=1)  # not started by torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert rank_info() == RankInfo(rank=5, n_ranks=8, local_rank=1, n_local_ranks=4)


def test_idle_threads_of_openmp_sleep_soon_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for changed, expected in (
        ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "1"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ):
        monkeypatch.setattr("os.environ", dict(changed))
        limit_busy_waiting()
        assert {name: os.environ[name] for name in names if name in os.environ} == expected


def test_a_program_limits_busy_waiting_before_it_does_anything() -> None:
    """Torch reads the variables when it is imported."""
    code = (
        "import os, sys; from gptpipe.shell.process import run; "
        "run(lambda: print(os.environ['GOMP_SPINCOUNT']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    ).stdout
    assert printed == "1000\n"

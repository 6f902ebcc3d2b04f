"""The MLflow run id of a result follows it wherever DVC and git take the result."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from toy_pipeline import commit, copy_project, finished_runs, run, set_params

pytestmark = pytest.mark.slow  # the fixture runs stages train and evaluate

CHANGE = "train.max_steps=9"


class Tried(NamedTuple):
    """A project after an experiment, whose result is in the workspace and not committed."""

    project: Path
    before: str  # run id of the commit
    after: str  # run id of the experiment


@pytest.fixture(scope="module")
def tried(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    project = copy_project(reproduced, tmp_path_factory.mktemp("tried") / "copy")
    before = run_id(project)
    run(project, "dvc", "exp", "run", "-n", "tried", "-S", CHANGE)
    return Tried(project, before, run_id(project))


@pytest.fixture
def project(tried: Tried, tmp_path: Path) -> Path:
    """A copy of the project that the test may change."""
    return copy_project(tried.project, tmp_path / "copy")


def run_id(project: Path) -> str:
    """The run id in the workspace, which the metrics that DVC shows must name too."""
    content = json.loads((project / "reports/mlflow_run.json").read_bytes())
    shown = json.loads((project / "reports/metrics.json").read_bytes())["run"]
    assert content["run_id"].startswith(shown)
    assert len(shown) == 8
    return str(content["run_id"])


def go_to_the_commit(project: Path) -> None:
    run(project, "git", "checkout", "-q", "--", ".")
    run(project, "dvc", "checkout")


def test_each_training_has_its_run(tried: Tried) -> None:
    assert tried.before != tried.after
    assert finished_runs(tried.project) == {tried.before, tried.after}


def test_the_run_id_follows_checkout_and_apply(tried: Tried, project: Path) -> None:
    go_to_the_commit(project)
    assert run_id(project) == tried.before
    run(project, "dvc", "exp", "apply", "tried")
    assert run_id(project) == tried.after


def test_the_run_id_follows_branches(tried: Tried, project: Path) -> None:
    run(project, "git", "checkout", "-q", "-b", "another")
    commit(project)
    run(project, "git", "checkout", "-q", "-")
    run(project, "dvc", "checkout")
    assert run_id(project) == tried.before
    run(project, "git", "checkout", "-q", "another")
    run(project, "dvc", "checkout")
    assert run_id(project) == tried.after


def test_the_run_id_follows_the_run_cache(tried: Tried, project: Path) -> None:
    """The same parameters again: DVC takes the result from its cache, and nothing is trained or recorded."""
    go_to_the_commit(project)
    set_params(project, {"train.max_steps": 9})
    output = run(project, "dvc", "repro").stdout
    assert "Stage 'train' is cached" in output
    assert "Stage 'evaluate' is cached" in output
    assert run_id(project) == tried.after
    assert finished_runs(project) == {tried.before, tried.after}

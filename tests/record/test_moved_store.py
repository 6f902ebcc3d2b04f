"""A project that is moved or copied with its store, a store that several projects share, and unusual paths."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from tiny import LINEAGE, make_model
from toy_registration import evaluate

from gptpipe.params import Params
from gptpipe.record.outbox import store_name
from gptpipe.record.run import training_run
from gptpipe.record.sqlite_store import outdated_locations, sqlite_file, update_locations
from gptpipe.record.store import connect
from gptpipe.shell.environment import sqlite_uri, tracking_uri


def new_project(folder: Path, fresh_store: Path) -> Path:
    (folder / ".dvc").mkdir(parents=True)
    shutil.copy(fresh_store, folder / "mlflow.db")
    return folder


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a project, as a new process would: MLflow has set the variable to the earlier store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)


def train_and_register(params: Params) -> str:
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.text("words.md", "words")
    model = Path("models/gpt") if Path("models/gpt").exists() else make_model(Path("models/gpt"))
    evaluate(params, model, record.run_id, 2.0)
    return record.run_id


def locations(project: Path) -> set[str]:
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        rows = database.execute(
            "select artifact_location from experiments where name = 'gptpipe' union "
            "select artifact_uri from runs union "
            "select artifact_location from logged_models union "
            "select storage_location from model_versions"
        )
        return {location for (location,) in rows}


@pytest.mark.parametrize("is_copied", [False, True], ids=["moved", "copied"])
def test_a_project_keeps_working_in_another_folder(
    tmp_path: Path, fresh_store: Path, params: Params, monkeypatch: pytest.MonkeyPatch, is_copied: bool
) -> None:
    old, new = new_project(tmp_path / "old", fresh_store), tmp_path / "new place"
    enter(old, monkeypatch)
    run_id = train_and_register(params)
    monkeypatch.chdir(tmp_path)
    if is_copied:
        shutil.copytree(old, new)
    else:
        old.rename(new)
    enter(new, monkeypatch)
    before = sorted(old.rglob("*"))
    client = connect()
    assert all(location.startswith(new.as_uri()) for location in locations(new))
    assert Path(client.download_artifacts(run_id, "words.md")).read_text() == "words"
    assert mlflow.pyfunc.load_model("models:/gpt@champion")
    second = train_and_register(params)
    assert (new / "mlartifacts" / second / "artifacts/words.md").exists()
    assert sorted(old.rglob("*")) == before


def test_artifacts_that_were_not_moved_stay_where_they_are(
    tmp_path: Path, fresh_store: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the database is moved. What is written from now on is beside it."""
    project, shared = new_project(tmp_path / "project", fresh_store), tmp_path / "shared"
    enter(project, monkeypatch)
    run_id = train_and_register(params)
    shared.mkdir()
    for file in project.glob("mlflow.db*"):
        file.rename(shared / file.name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared / 'mlflow.db'}")
    assert Path(connect().download_artifacts(run_id, "words.md")).read_text() == "words"
    second = train_and_register(params)
    assert (shared / "mlartifacts" / second).exists()
    assert mlflow.pyfunc.load_model("models:/gpt@champion")


def test_two_projects_with_one_store_keep_their_artifacts_beside_it(
    tmp_path: Path, fresh_store: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        enter(new_project(tmp_path / name, fresh_store), monkeypatch)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/team/runs.db")
        run_id = train_and_register(params)
        assert (tmp_path / "team/mlartifacts" / run_id / "artifacts/words.md").exists()
        assert not (tmp_path / name / "mlartifacts").exists()
    shutil.rmtree(tmp_path / "first")
    assert mlflow.pyfunc.load_model("models:/gpt@champion")


def test_a_location_that_the_user_chose_stays(
    tmp_path: Path, fresh_store: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its disk is not mounted at the moment."""
    project, chosen = new_project(tmp_path / "project", fresh_store), tmp_path / "disk/mlartifacts"
    enter(project, monkeypatch)
    mlflow.MlflowClient(tracking_uri()).create_experiment("gptpipe", chosen.as_uri())
    run_id = train_and_register(params)
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    chosen.rename(tmp_path / "away")
    enter(tmp_path / "moved", monkeypatch)
    connect()
    assert update_locations(tmp_path / "moved/mlflow.db") == 0
    (tmp_path / "away").rename(chosen)
    assert Path(connect().download_artifacts(run_id, "words.md")).read_text() == "words"


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "x"', "a#b", "100%", "a%20b", "a?b", "é", "a%3Fb?c=d&e", "a:b@c"]
)
def test_a_project_works_under_any_path(
    tmp_path: Path,
    fresh_store: Path,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
) -> None:
    project = new_project(tmp_path / name / "project", fresh_store)
    enter(project, monkeypatch)
    assert sqlite_file(tracking_uri()) == project / "mlflow.db"
    run_id = train_and_register(params)
    assert (project / "mlartifacts" / run_id / "artifacts/words.md").exists()
    assert Path(connect().download_artifacts(run_id, "words.md")).read_text() == "words"
    # Elsewhere, because MLflow decodes the path once too often if it has `%` and two hex digits.
    copy = tmp_path_factory.mktemp("copy")
    assert mlflow.pyfunc.load_model("models:/gpt@champion", dst_path=str(copy))
    assert outdated_locations(project / "mlflow.db") == []
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing outside the project


def test_a_relative_store_belongs_to_the_project_and_not_to_the_current_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC runs experiments in a temporary copy, which it removes with everything in it."""
    copy = project / "100%/sub"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mine.db")
    assert sqlite_file(tracking_uri()) == project / "runs/mine.db"
    assert store_name() == "experiment gptpipe in sqlite:///runs/mine.db"


def test_the_outbox_of_a_store_in_the_project_moves_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for name in ("old", "new"):
        (tmp_path / name / ".dvc").mkdir(parents=True)
        enter(tmp_path / name, monkeypatch)
        names.append(store_name())
    assert names == ["experiment gptpipe in sqlite:///mlflow.db"] * 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(tmp_path / "x?.db"))
    assert store_name() == f"experiment gptpipe in sqlite:///{tmp_path}/x?.db"

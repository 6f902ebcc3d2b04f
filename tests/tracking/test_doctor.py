"""`gptpipe doctor`: each thing that can be wrong with the record, put there, and found by its line and exit code."""

import json
import os
import platform
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import tiny
from mlflow.tracking import MlflowClient

from gptpipe.files import new_folder, write_bytes
from gptpipe.tracking import doctor as module
from gptpipe.tracking.doctor import doctor
from gptpipe.tracking.registry import CHAMPION, MODEL_NAME
from gptpipe.tracking.store import connect

ROOT = Path(__file__).parents[2]
GONE = 2**22 + 1  # above Linux's largest process number


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Exit code, and check -> (mark, text); without DVC, which tests/test_pipeline.py asks."""
    monkeypatch.setattr(module, "_pipeline", lambda: "not asked")

    def run(*, fix: bool = False) -> tuple[int, dict[str, tuple[str, str]]]:
        code = doctor(fix=fix)
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        return code, {name: (mark, text) for mark, name, text in lines}

    return run


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_split(tmp_path_factory.mktemp("toy")).parent


@pytest.fixture
def made(project: Path, toy_data: Path) -> Path:
    """The project with the shipped parameters, and what all stages make but train and evaluate."""
    shutil.copy(ROOT / "params.yaml", project)
    shutil.copytree(toy_data, project / "data")
    return project


def begin(process: str, status: str = "RUNNING") -> tuple[MlflowClient, str]:
    client = connect()
    experiment = client.get_experiment_by_name("gptpipe")
    assert experiment is not None
    run_id = client.create_run(experiment.experiment_id, tags={"process": process}).info.run_id
    if status != "RUNNING":
        client.set_terminated(run_id, status)
    return client, run_id


def test_a_fresh_clone_is_well_and_stays_as_it_is(project: Path, told) -> None:
    shutil.copy(ROOT / "params.yaml", project)
    code, lines = told()
    assert code == 0
    assert "error" not in {mark for mark, _ in lines.values()}
    assert lines["data/raw"][0] == lines["store"][0] == lines["checkpoints"][0] == "ok"
    assert "nothing made yet" in lines["data/raw"][1]
    assert sorted(path.name for path in project.iterdir()) == [".dvc", "params.yaml"]


def test_damage_goes_before_a_store_that_is_down(made: Path, told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, lines = told()
    assert (code, lines["store"][0]) == (5, "error")
    assert "runs" not in lines
    assert {lines[f"data/{name}"][0] for name in ("raw", "tokens", "split")} == {"ok"}
    with (made / "data/split/val/tokens.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    code, lines = told()
    assert (code, lines["data/split"][0], lines["data/tokens"][0]) == (4, "error", "ok")
    assert "data/split/val/tokens.npy: differs" in lines["data/split"][1]


def test_an_artefact_of_another_parent_and_bad_parameters(made: Path, told) -> None:
    with new_folder(made / "data/raw", {}) as new:
        write_bytes(new.path / "other", b"")
    code, lines = told()
    assert (code, lines["data/raw"][0], lines["data/tokens"][0]) == (4, "ok", "error")
    assert "another data/raw" in lines["data/tokens"][1]
    (made / "params.yaml").write_text("seed: x\n")
    assert told()[0] == 2


def test_checkpoints_and_leftovers(project: Path, told) -> None:
    (project / "data/.split.partial").mkdir(parents=True)
    state = project / ".gptpipe/checkpoints/abc/step-00000003"
    with new_folder(state, {}) as new:
        write_bytes(new.path / "state.json", b"{}")
    _, lines = told()
    assert lines["checkpoints"][0] == "ok"
    assert lines["checkpoints"][1].startswith("1 are sound")
    assert lines["leftovers"] == ("warning", lines["leftovers"][1])
    assert "data/.split.partial" in lines["leftovers"][1]
    (state / "state.json").write_bytes(b"[]")
    code, lines = told()
    assert (code, lines["checkpoints"][0]) == (2, "error")  # no params.yaml here: 2 goes before 4
    assert "step-00000003/state.json: differs" in lines["checkpoints"][1]


def test_runs_whose_process_is_gone_are_told_and_closed(made: Path, told) -> None:
    client, gone = begin(f"{GONE} on {platform.node()}")
    _, mine = begin(f"{os.getpid()} on {platform.node()}")
    _, elsewhere = begin(f"{GONE} on another-machine")
    _, ended = begin(f"{GONE} on {platform.node()}", "FINISHED")
    code, lines = told()
    assert (code, lines["runs"][0]) == (0, "warning")
    assert f"1 run without a process: {gone}" in lines["runs"][1]
    assert lines["champion"] == ("ok", "no model is registered yet")
    code, lines = told(fix=True)
    assert lines["runs"] == ("ok", "running: 2; closed as KILLED: 1")
    statuses = [client.get_run(run_id).info.status for run_id in (gone, mine, elsewhere, ended)]
    assert statuses == ["KILLED", "RUNNING", "RUNNING", "FINISHED"]


def test_what_waits_in_the_outbox_is_told_and_sent(made: Path, told) -> None:
    client, run_id = begin("", "FINISHED")
    waiting = made / f".gptpipe/outbox/{run_id}.jsonl"
    write_bytes(waiting, json.dumps(["metrics", [["train/loss", 2.5, 1, 7]]]).encode() + b"\n")
    assert told()[1]["outbox"][0] == "warning"
    assert waiting.exists()
    assert told(fix=True)[1]["outbox"] == ("ok", "none")
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")] == [(7, 2.5)]


def test_the_champion_and_the_run_of_the_workspace(made: Path, told) -> None:
    client, run_id = begin("", "FINISHED")
    write_bytes(made / "reports/mlflow_run.json", json.dumps({"run_id": run_id}).encode())
    model = tiny.make_model(made / "registered/artifacts/gpt")
    client.create_registered_model(MODEL_NAME)
    client.create_model_version(MODEL_NAME, (made / "registered").as_uri(), run_id)
    assert told()[1][CHAMPION][0] == "error"  # no version has the alias
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, "1")
    code, lines = told()
    assert (code, lines[CHAMPION][0], lines["workspace"][0]) == (0, "ok", "ok")
    (model / "model.safetensors").write_bytes(b"")
    write_bytes(made / "reports/mlflow_run.json", json.dumps({"run_id": "0" * 32}).encode())
    code, lines = told()
    assert (code, lines[CHAMPION][0], lines["workspace"][0]) == (4, "error", "warning")
    shutil.rmtree(model)
    assert told()[1][CHAMPION][0] == "error"


def test_a_store_that_is_damaged(made: Path, told) -> None:
    connect()
    database = made / "mlflow.db"
    database.write_bytes(b"SQLite format 3\0" + bytes(5000))
    code, lines = told()
    assert (code, lines["store"][0]) == (4, "error")
    assert str(database) in lines["store"][1]


def test_a_store_of_an_older_mlflow_is_told_with_its_remedy_and_left_as_it_is(
    made: Path, told, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect()
    with closing(sqlite3.connect(made / "mlflow.db")) as database:
        database.execute(f"vacuum into '{made / 'old.db'}'")  # under a name that this process has not looked at yet
    with closing(sqlite3.connect(made / "old.db")) as database, database:
        database.execute("update alembic_version set version_num = '451aebb31d03'")
    before = (made / "old.db").read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made / 'old.db'}")
    code, lines = told()
    assert (code, lines["store"][0]) == (5, "error")
    assert "out-of-date database schema" in lines["store"][1]
    assert "mlflow db upgrade" in lines["store"][1]
    assert "runs" not in lines
    assert told(fix=True)[0] == 5
    assert (made / "old.db").read_bytes() == before


def test_other_versions_than_the_pinned_ones(project: Path, told) -> None:
    (project / "constraints.txt").write_text("# exact\nnumpy==1.0\nno-such-package==2.0\n")
    mark, text = told()[1]["versions"]
    assert mark == "warning"
    assert text.startswith("numpy ")
    assert "not 1.0 (1 in all)" in text

"""`gptpipe doctor`: each thing that can be wrong with the record, put there, and found by its line and exit code."""

import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import tiny
from filelock import FileLock
from mlflow.tracking import MlflowClient

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import new_folder
from gptpipe.commands import doctor as module
from gptpipe.commands.doctor import doctor
from gptpipe.evaluate.registry import CHAMPION, MODEL_NAME
from gptpipe.record.store import connect

pytestmark = pytest.mark.usefixtures("project")

ROOT = Path(__file__).parents[2]
GONE = 2**22 + 1  # above Linux's largest process number


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Exit code, and check -> (mark, text); without DVC, which tests/test_pipeline.py asks."""
    monkeypatch.setattr(module.dvc_state, "changed_stages", list)

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
    (project / "mlflow.db").unlink()
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


DAMAGED_LOCKS = {
    "empty": b"",
    "cut": b"schema: '2.0'\nstages:\n  collect:\n    cmd: python -m stages.coll\n    deps:\n    - pa",
    "of another schema": b"schema: '9.0'\nstages: {}\n",
    "with marks of a conflict": b"<<<<<<< ours\nschema: '2.0'\n=======\nschema: '2.0'\n>>>>>>> theirs\n",
    "not text": b"\xff\xfe\x00",
    "nested": b"[" * 5_000,
}


@pytest.mark.parametrize("content", DAMAGED_LOCKS.values(), ids=DAMAGED_LOCKS.keys())
def test_a_dvc_lock_that_dvc_cannot_read_is_moved_aside(made: Path, told, content: bytes) -> None:
    (made / "dvc.lock").write_bytes(content)
    (made / "dvc.lock.damaged").write_bytes(b"of an earlier time")
    code, lines = told()
    assert (code, lines["dvc.lock"][0]) == (4, "error")
    assert "`gptpipe doctor --fix` moves it aside" in lines["dvc.lock"][1]
    assert (made / "dvc.lock").read_bytes() == content
    code, lines = told(fix=True)
    assert (code, lines["dvc.lock"][0]) == (0, "ok")
    assert not (made / "dvc.lock").exists()
    assert (made / "dvc.lock.damaged1").read_bytes() == content


def test_a_sound_dvc_lock_stays(made: Path, told) -> None:
    (made / "dvc.lock").write_text("schema: '2.0'\nstages:\n  collect:\n    cmd: python -m stages.collect\n")
    assert told(fix=True)[1]["dvc.lock"] == ("ok", "dvc.lock can be read")
    assert (made / "dvc.lock").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"write": {"a": {"pid": "x", "cmd": ""}}}', b'{"write": {"a": {"pid": 1, "cmd": "dvc"}}}']
)
def test_a_list_of_paths_in_use_that_stops_dvc_is_removed(made: Path, told, content: bytes) -> None:
    write_bytes(made / ".dvc/tmp/rwlock", content)
    code, lines = told()
    assert (code, lines["rwlock"][0]) == (5, "error")
    assert told(fix=True)[0] == 0
    assert not (made / ".dvc/tmp/rwlock").exists()
    write_bytes(made / ".dvc/tmp/rwlock", b"{}")
    assert told(fix=True)[1]["rwlock"] == ("ok", "none")


def test_a_cut_gitignore_gets_back_what_dvc_stores(made: Path, told) -> None:
    shutil.copy(ROOT / "dvc.yaml", made)
    (made / "data/.gitignore").write_bytes(b"/raw\n/mine\n/tok\xff")
    code, lines = told()
    assert (code, lines[".gitignore"][0]) == (4, "error")
    assert "/split, /tokens" in ", ".join(
        sorted(lines[".gitignore"][1].split("without ")[1].split(", so")[0].split(", "))
    )
    assert told(fix=True)[0] == 0
    assert (made / "data/.gitignore").read_text().splitlines() == ["/raw", "/mine", "/tok", "/tokens", "/split"]
    assert told()[1][".gitignore"][0] == "ok"


def test_a_damaged_file_of_the_cache_is_removed(made: Path, told) -> None:
    good = made / ".dvc/cache/files/md5" / "5d/41402abc4b2a76b9719d911017c592"
    write_bytes(good, b"hello")
    bad = made / ".dvc/cache/files/md5" / "00/000000000000000000000000000000.dir"
    write_bytes(bad, b"[]")
    code, lines = told()
    assert (code, lines["cache"][0]) == (4, "error")
    assert str(bad.relative_to(made)) in lines["cache"][1]
    assert told(fix=True)[1]["cache"] == ("ok", "removed 1 damaged files of 2; `dvc repro` makes them again")
    assert good.exists()
    assert not bad.exists()


def test_what_killed_processes_leave_is_told_and_removed(made: Path, told) -> None:
    """Only what nobody uses: a process works in the second experiment, and this one holds the second lock."""
    copies = [made / ".dvc/tmp/exps" / name for name in ("standalone/tmpabc", "tmpdef")]
    for copy in copies:
        (copy / "data").mkdir(parents=True)
    locks = [made / "data" / name for name in (".raw.lock", ".split.lock")]
    for lock in locks:
        lock.touch()
    partials = [made / name for name in (".gptpipe/.registration.partial/model", ".mlflow.db.12ab.partial")]
    for partial in partials:
        write_bytes(partial, b"x")
    worker = subprocess.Popen([sys.executable, "-c", "input()"], cwd=copies[1] / "data", stdin=subprocess.PIPE)
    try:
        with FileLock(locks[1]):
            _, lines = told()
            assert {lines[name][0] for name in ("experiments", "locks", "leftovers")} == {"warning"}
            assert all(path.exists() for path in (*copies, *locks, *partials))
            _, lines = told(fix=True)
            assert {lines[name][0] for name in ("experiments", "locks", "leftovers")} == {"ok"}
            assert [path.exists() for path in (*copies, *locks)] == [False, True, False, True]
            assert not partials[0].parent.exists()
            assert not partials[1].exists()
    finally:
        worker.communicate(b"\n")


def test_no_damage_ends_the_doctor_with_a_traceback(
    made: Path, told, monkeypatch: pytest.MonkeyPatch, toy_data: Path
) -> None:
    """Everything that it reads is replaced by noise, then by a folder, then by a file that may not be read."""
    names = ("params.yaml", "dvc.yaml", "dvc.lock", "constraints.txt", ".dvc/tmp/rwlock", "reports/mlflow_run.json",
             "data/.gitignore", "data/raw/manifest.json", "data/split/train/tokens.npy", "mlflow.db",
             ".gptpipe/outbox/abc.jsonl", ".gptpipe/checkpoints/a/step-00000001/manifest.json",
             "models/gpt/manifest.json")  # fmt: skip
    tiny.make_model(made / "models/gpt")
    begin("x on y")
    monkeypatch.setattr(psutil.Process, "create_time", refuse)
    for name in names:
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes() if path.exists() else b""
        for content in (b"\xff\x00[{", b"[" * 2_000):
            path.write_bytes(content)
            _, lines = told()
            assert len(lines) > 12, name
            assert not [text for _, text in lines.values() if "this check failed" in text], (name, content)
        path.unlink()
        path.mkdir()
        _, lines = told()
        assert not [text for _, text in lines.values() if "this check failed" in text], name
        path.rmdir()
        if kept:
            path.write_bytes(kept)


def refuse(*_: object) -> None:
    raise psutil.AccessDenied


def test_a_password_in_the_address_of_the_store_is_not_shown(made: Path, told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mary:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mark, text = told()[1]["store"]
    assert mark == "error"
    assert "127.0.0.1" in text
    assert "mary" not in text
    assert "hunter2" not in text


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

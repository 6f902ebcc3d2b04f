"""`gptpipe doctor`: damage is done on purpose, found by its line and exit code, and repaired by --fix."""

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
from toy_registration import evaluate

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import new_folder
from gptpipe.commands import dvc_state
from gptpipe.commands.doctor import doctor
from gptpipe.evaluate.registry import CHAMPION, MODEL_NAME
from gptpipe.params import Params, load_params
from gptpipe.record.outbox import keep, outbox_folder, with_checksum
from gptpipe.record.store import connect
from gptpipe.shell.environment import sqlite_uri
from gptpipe.train.checkpoint import Checkpoints
from gptpipe.train.settings import settings_of

pytestmark = pytest.mark.usefixtures("project")

ROOT = Path(__file__).parents[2]
NO_PROCESS = 2**22 + 1  # above Linux's largest process number


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Runs the doctor; returns its exit code, and check -> (status, text).

    Without `dvc status`, which tests/test_pipeline.py covers.
    """
    monkeypatch.setattr(dvc_state, "changed_stages", list)

    def run(**options: bool) -> tuple[int, dict[str, tuple[str, str]]]:
        code = doctor(**{"fix": False, **options})
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        return code, {name: (status, text) for status, name, text in lines}

    return run


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_split(tmp_path_factory.mktemp("toy")).parent


@pytest.fixture
def made(project: Path, toy_data: Path) -> Path:
    """The project with the shipped parameters, and the outputs of collect, tokenize and split."""
    shutil.copy(ROOT / "params.yaml", project)
    shutil.copytree(toy_data, project / "data")
    return project


def create_run(process: str, status: str = "RUNNING") -> tuple[MlflowClient, str]:
    """A client, and the id of a new run that `process` started."""
    client = connect()
    experiment = client.get_experiment_by_name("gptpipe")
    assert experiment is not None
    run_id = client.create_run(experiment.experiment_id, tags={"process": process}).info.run_id
    if status != "RUNNING":
        client.set_terminated(run_id, status)
    return client, run_id


def test_fresh_clone_has_no_errors_and_is_not_changed(project: Path, examine) -> None:
    shutil.copy(ROOT / "params.yaml", project)
    (project / "mlflow.db").unlink()
    code, lines = examine()
    assert code == 0
    assert "error" not in {status for status, _ in lines.values()}
    assert lines["data/raw"][0] == lines["store"][0] == lines["checkpoints"][0] == "ok"
    assert "nothing made yet" in lines["data/raw"][1]
    assert sorted(path.name for path in project.iterdir()) == [".dvc", "params.yaml"]


def test_damage_decides_the_exit_code_if_the_store_is_down_too(
    made: Path, examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, lines = examine()
    assert (code, lines["store"][0]) == (5, "error")
    assert "runs" not in lines
    assert {lines[f"data/{name}"][0] for name in ("raw", "tokens", "split")} == {"ok"}
    with (made / "data/split/val/tokens.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    code, lines = examine()
    assert (code, lines["data/split"][0], lines["data/tokens"][0]) == (4, "error", "ok")
    assert "data/split/val/tokens.npy: differs" in lines["data/split"][1]


def test_artefact_of_another_parent_and_invalid_parameters(made: Path, examine) -> None:
    with new_folder(made / "data/raw", {}) as new:
        write_bytes(new.path / "other", b"")
    code, lines = examine()
    assert (code, lines["data/raw"][0], lines["data/tokens"][0]) == (4, "ok", "error")
    assert "another data/raw" in lines["data/tokens"][1]
    (made / "params.yaml").write_text("seed: x\n")
    assert examine()[0] == 2


DAMAGED_LOCKS = {
    "empty": b"",
    "cut": b"schema: '2.0'\nstages:\n  collect:\n    cmd: python -m stages.coll\n    deps:\n    - pa",
    "of another schema": b"schema: '9.0'\nstages: {}\n",
    "with conflict markers": b"<<<<<<< ours\nschema: '2.0'\n=======\nschema: '2.0'\n>>>>>>> theirs\n",
    "not text": b"\xff\xfe\x00",
    "nested": b"[" * 500,  # too deep for ruamel.yaml, whose time is more than quadratic in the depth
}


@pytest.mark.parametrize("content", DAMAGED_LOCKS.values(), ids=DAMAGED_LOCKS.keys())
def test_damaged_dvc_lock_is_moved_aside(made: Path, examine, content: bytes) -> None:
    (made / "dvc.lock").write_bytes(content)
    (made / "dvc.lock.damaged").write_bytes(b"of an earlier repair")
    code, lines = examine()
    assert (code, lines["dvc.lock"][0]) == (4, "error")
    assert "`gptpipe doctor --fix` moves it aside" in lines["dvc.lock"][1]
    assert (made / "dvc.lock").read_bytes() == content
    code, lines = examine(fix=True)
    assert (code, lines["dvc.lock"][0]) == (0, "ok")
    assert not (made / "dvc.lock").exists()
    assert (made / "dvc.lock.damaged1").read_bytes() == content


def test_valid_dvc_lock_stays(made: Path, examine) -> None:
    (made / "dvc.lock").write_text("schema: '2.0'\nstages:\n  collect:\n    cmd: python -m stages.collect\n")
    assert examine(fix=True)[1]["dvc.lock"] == ("ok", "dvc.lock can be read")
    assert (made / "dvc.lock").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"write": {"a": {"pid": "x", "cmd": ""}}}', b'{"write": {"a": {"pid": 1, "cmd": "dvc"}}}'],
)
def test_damaged_or_outdated_rwlock_is_removed(made: Path, examine, content: bytes) -> None:
    write_bytes(made / ".dvc/tmp/rwlock", content)
    code, lines = examine()
    assert (code, lines["rwlock"][0]) == (5, "error")
    assert examine(fix=True)[0] == 0
    assert not (made / ".dvc/tmp/rwlock").exists()
    write_bytes(made / ".dvc/tmp/rwlock", b"{}")
    assert examine(fix=True)[1]["rwlock"] == ("ok", "none")


def test_cut_gitignore_is_completed(made: Path, examine) -> None:
    shutil.copy(ROOT / "dvc.yaml", made)
    (made / "data/.gitignore").write_bytes(b"/raw\n/mine\n/tok\xff")
    code, lines = examine()
    assert (code, lines[".gitignore"][0]) == (4, "error")
    missing = lines[".gitignore"][1].split("without ")[1].split(", so")[0]
    assert sorted(missing.split(", ")) == ["/split", "/tokens"]
    assert examine(fix=True)[0] == 0
    assert (made / "data/.gitignore").read_text().splitlines() == ["/raw", "/mine", "/tok", "/tokens", "/split"]
    assert examine()[1][".gitignore"][0] == "ok"


def test_damaged_cache_file_is_removed(made: Path, examine) -> None:
    good = made / ".dvc/cache/files/md5" / "5d/41402abc4b2a76b9719d911017c592"
    write_bytes(good, b"hello")
    bad = made / ".dvc/cache/files/md5" / "00/000000000000000000000000000000.dir"
    write_bytes(bad, b"[]")
    code, lines = examine()
    assert (code, lines["cache"][0]) == (4, "error")
    assert str(bad.relative_to(made)) in lines["cache"][1]
    assert examine(fix=True)[1]["cache"] == ("ok", "removed 1 damaged files of 2; `dvc repro` makes them again")
    assert good.exists()
    assert not bad.exists()


def test_leftovers_of_killed_processes_are_reported_and_removed(made: Path, examine) -> None:
    """What is in use stays: a process works in the second experiment, and this one holds the second lock."""
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
            _, lines = examine()
            assert {lines[name][0] for name in ("experiments", "locks", "leftovers")} == {"warning"}
            assert all(path.exists() for path in (*copies, *locks, *partials))
            _, lines = examine(fix=True)
            assert {lines[name][0] for name in ("experiments", "locks", "leftovers")} == {"ok"}
            assert [path.exists() for path in (*copies, *locks)] == [False, True, False, True]
            assert not partials[0].parent.exists()
            assert not partials[1].exists()
    finally:
        worker.communicate(b"\n")


FILES_READ = (
    "params.yaml",
    "dvc.yaml",
    "dvc.lock",
    "constraints.txt",
    ".dvc/tmp/rwlock",
    "reports/mlflow_run.json",
    "data/.gitignore",
    "data/raw/manifest.json",
    "data/split/train/tokens.npy",
    "mlflow.db",
    ".gptpipe/outbox/abc.jsonl",
    ".gptpipe/checkpoints/a/step-00000001/manifest.json",
    "models/gpt/manifest.json",
)


@pytest.mark.slow
def test_no_damage_makes_a_check_fail(made: Path, examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that the doctor reads is replaced by noise, then by a folder."""
    tiny.make_model(made / "models/gpt")
    create_run("x on y")
    monkeypatch.setattr(psutil.Process, "create_time", deny_access)
    for name in FILES_READ:
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes() if path.exists() else b""
        too_deep = b"[" * (500 if path.suffix in (".yaml", ".lock") else 2_000)
        for content in (b"\xff\x00[{", too_deep):
            path.write_bytes(content)
            _, lines = examine()
            assert len(lines) > 12, name
            assert not [text for _, text in lines.values() if "this check failed" in text], (name, content)
        path.unlink()
        path.mkdir()
        _, lines = examine()
        assert not [text for _, text in lines.values() if "this check failed" in text], name
        path.rmdir()
        if kept:
            path.write_bytes(kept)


def deny_access(*_: object) -> None:
    raise psutil.AccessDenied


def test_password_in_the_store_address_is_not_shown(
    made: Path, examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mary:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    status, text = examine()[1]["store"]
    assert status == "error"
    assert "127.0.0.1" in text
    assert "mary" not in text
    assert "hunter2" not in text


def test_checkpoints_and_partial_files_are_checked(project: Path, examine) -> None:
    (project / "data/.split.partial").mkdir(parents=True)
    state = project / ".gptpipe/checkpoints/abc/step-00000003"
    with new_folder(state, {}) as new:
        write_bytes(new.path / "state.json", b"{}")
    _, lines = examine()
    assert lines["checkpoints"][0] == "ok"
    assert lines["checkpoints"][1].startswith("1 are intact")
    assert lines["leftovers"][0] == "warning"
    assert "data/.split.partial" in lines["leftovers"][1]
    (state / "state.json").write_bytes(b"[]")
    code, lines = examine()
    assert (code, lines["checkpoints"][0]) == (2, "error")  # 2, because there is no params.yaml here
    assert "step-00000003/state.json: differs" in lines["checkpoints"][1]


def test_abandoned_trainings_are_listed_and_removed_only_on_request(project: Path, examine) -> None:
    """One with the parameters that ship, and one with another learning rate."""
    shutil.copy(ROOT / "params.yaml", project)
    params = load_params(ROOT / "params.yaml")
    other = params.model_copy(update={"train": params.train.model_copy(update={"lr": 1.0})})
    root = project / ".gptpipe/checkpoints"
    for name, section in (("a" * 16, params), ("b" * 16, other)):
        state, _, _ = tiny.trained_state(1)
        Checkpoints(root / name, {}, settings_of(section, "c" * 64, {}, 800)).save(state)
    _, lines = examine()
    status, text = lines["abandoned"]
    assert status == "warning"
    assert text.startswith("trainings that these parameters do not continue (1, 0.2 MiB): ")
    assert f"{root / ('b' * 16)} (step 1, 0.2 MiB; train.lr was 1.0, is 0.01)" in text
    examine(fix=True)
    assert len(list(root.glob("*/"))) == 2
    _, lines = examine(remove_checkpoints=True)
    assert lines["abandoned"] == ("ok", "removed 1, 0.2 MiB")
    assert [path.name for path in root.glob("*/")] == ["a" * 16]
    assert examine()[1]["abandoned"] == ("ok", "none")


def test_runs_without_a_process_are_reported_and_closed(made: Path, examine) -> None:
    client, killed = create_run(f"{NO_PROCESS} on {platform.node()}")
    _, own = create_run(f"{os.getpid()} on {platform.node()}")
    _, elsewhere = create_run(f"{NO_PROCESS} on another-machine")
    _, finished = create_run(f"{NO_PROCESS} on {platform.node()}", "FINISHED")
    code, lines = examine()
    assert (code, lines["runs"][0]) == (0, "warning")
    assert f"1 run has no process any more, for example {killed}" in lines["runs"][1]
    assert lines["champion"] == ("ok", "no model is registered yet")
    code, lines = examine(fix=True)
    assert lines["runs"] == ("ok", "running: 2; closed as KILLED: 1")
    statuses = [client.get_run(run_id).info.status for run_id in (killed, own, elsewhere, finished)]
    assert statuses == ["KILLED", "RUNNING", "RUNNING", "FINISHED"]


def test_waiting_records_are_reported_and_sent(made: Path, examine) -> None:
    client, run_id = create_run("", "FINISHED")
    waiting = made / f".gptpipe/outbox/{run_id}.jsonl"
    write_bytes(waiting, with_checksum(json.dumps(["metrics", [["train/loss", 2.5, 1, 7]]]).encode()) + b"\n")
    assert examine()[1]["outbox"][0] == "warning"
    assert waiting.exists()
    assert examine(fix=True)[1]["outbox"] == ("ok", "none")
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")] == [(7, 2.5)]


def test_records_for_another_store_are_reported_and_not_sent(
    made: Path, examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run_id = create_run("", "FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mary:secret@127.0.0.1:9")
    waiting = outbox_folder() / f"{run_id}.jsonl"
    assert keep(waiting, [("metrics", [["train/loss", 2.5, 1, 7]])])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(made / "mlflow.db"))
    status, text = examine(fix=True)[1]["outbox"]
    assert (status, "experiment gptpipe in http://***@127.0.0.1:9" in text, "secret" in text) == (
        "warning",
        True,
        False,
    )
    assert client.get_metric_history(run_id, "train/loss") == []


def test_locations_of_a_copied_store_are_reported_and_updated(
    made: Path,
    examine,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    evaluate(params, tiny.make_model(made / "models/gpt"), None, 2.0)
    copy = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(made, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(copy / "mlflow.db"))
    code, lines = examine()
    assert (code, lines["artifacts"][0], lines["champion"][0]) == (4, "error", "ok")
    assert f"for example {made}/mlartifacts; `gptpipe doctor --fix`" in lines["artifacts"][1]
    assert "not checked" in lines["champion"][1]
    _, lines = examine(fix=True)
    assert lines["artifacts"] == ("ok", f"updated 4 locations in {copy}/mlflow.db, which was moved or copied")
    assert lines["champion"] == ("ok", "gpt version 1: all files match the manifest")
    shutil.rmtree(copy / "mlartifacts")
    assert examine()[1]["champion"][0] == "error"  # it is not read from the old folder


def test_restored_folders_that_were_moved_with_the_project_are_repaired(
    examine, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    old, new = (tmp_path_factory.mktemp(name) for name in ("old", "new"))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-C", str(old / "project")]
    subprocess.run(["git", "init", "-q", str(old / "project")], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    subprocess.run([*git, "worktree", "add", "-q", "--detach", str(old / "project-0123")], check=True)
    for name in ("project", "project-0123"):
        (old / name).rename(new / name)
    (new / "project/.dvc").mkdir()
    monkeypatch.chdir(new / "project")
    assert examine()[1]["worktrees"][0] == "warning"
    assert examine(fix=True)[1]["worktrees"] == ("ok", "repaired 1 that were moved with this project")
    status = subprocess.run(["git", "-C", str(new / "project-0123"), "status"], capture_output=True, text=True)
    assert "Not currently on any branch" in status.stdout
    assert examine()[1]["worktrees"] == ("ok", "every worktree has its folder")


def test_code_of_another_folder_is_reported(project: Path, examine) -> None:
    (project / "gptpipe").mkdir()
    status, text = examine()[1]["versions"]
    assert status == "warning"
    assert text.startswith(f"`gptpipe` runs the code in {ROOT}, not that of this project")


def test_champion_and_run_of_the_workspace_are_checked(made: Path, examine) -> None:
    client, run_id = create_run("", "FINISHED")
    write_bytes(made / "reports/mlflow_run.json", json.dumps({"run_id": run_id}).encode())
    model = tiny.make_model(made / "registered/artifacts/gpt")
    client.create_registered_model(MODEL_NAME)
    client.create_model_version(MODEL_NAME, (made / "registered").as_uri(), run_id)
    assert examine()[1][CHAMPION][0] == "error"  # no version is the champion yet
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, "1")
    code, lines = examine()
    assert (code, lines[CHAMPION][0], lines["workspace"][0]) == (0, "ok", "ok")
    (model / "model.safetensors").write_bytes(b"")
    write_bytes(made / "reports/mlflow_run.json", json.dumps({"run_id": "0" * 32}).encode())
    code, lines = examine()
    assert (code, lines[CHAMPION][0], lines["workspace"][0]) == (4, "error", "warning")
    shutil.rmtree(model)
    assert examine()[1][CHAMPION][0] == "error"


def test_damaged_store_is_an_error(made: Path, examine) -> None:
    connect()
    database = made / "mlflow.db"
    database.write_bytes(b"SQLite format 3\0" + bytes(5000))
    code, lines = examine()
    assert (code, lines["store"][0]) == (4, "error")
    assert str(database) in lines["store"][1]


def test_store_of_an_older_mlflow_is_reported_with_its_fix_and_not_changed(
    made: Path, examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect()
    # A copy, because MLflow in this process has not opened a file of this name.
    with closing(sqlite3.connect(made / "mlflow.db")) as database:
        database.execute(f"vacuum into '{made / 'old.db'}'")
    with closing(sqlite3.connect(made / "old.db")) as database, database:
        database.execute("update alembic_version set version_num = '451aebb31d03'")
    before = (made / "old.db").read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made / 'old.db'}")
    code, lines = examine()
    assert (code, lines["store"][0]) == (5, "error")
    assert "out-of-date database schema" in lines["store"][1]
    assert "mlflow db upgrade" in lines["store"][1]
    assert "runs" not in lines
    assert examine(fix=True)[0] == 5
    assert (made / "old.db").read_bytes() == before


def test_other_versions_than_the_pinned_ones_are_reported(project: Path, examine) -> None:
    (project / "constraints.txt").write_text("# exact\nnumpy==1.0\nno-such-package==2.0\n")
    status, text = examine()[1]["versions"]
    assert status == "warning"
    assert text.startswith("numpy ")
    assert "not 1.0 (1 in all)" in text

"""The record of a training in a real SQLite store, and what happens when the store is not there."""

import os
import resource
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from tiny import LINEAGE

from gptpipe.config import Params
from gptpipe.errors import Interrupted, NumericError, SpikeError
from gptpipe.tracking import record as record_module
from gptpipe.tracking import store as store_module
from gptpipe.tracking.record import send_outbox, training_run
from gptpipe.tracking.store import StoreError, connect


def rows(project: Path) -> list[tuple[str, int, float]]:
    with sqlite3.connect(project / "mlflow.db") as database:
        return sorted(database.execute("select key, step, value from metrics where key not like 'system/%'"))


def test_a_run_holds_parameters_data_metrics_and_texts(project: Path, params: Params) -> None:
    with training_run(params, None, LINEAGE, {"threads": 2}) as record:
        record.metrics([(1, 1000, {"train/loss": 3.0}), (2, 2000, {"train/loss": 2.0, "val/loss": 2.5})])
        record.text("samples/step-00000002.md", "hello")
        record.tags({"red_flag.overfitting": "words"})
    client = connect()
    run = client.get_run(record.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == str(params.train.lr)
    assert run.data.params["model.architecture"] == params.model.architecture
    assert run.data.tags["environment.threads"] == "2"
    assert run.data.tags["red_flag.overfitting"] == "words"
    assert rows(project) == [("train/loss", 1, 3.0), ("train/loss", 2, 2.0), ("val/loss", 2, 2.5)]
    assert {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs} == {
        (f"split/{side}", "c" * 36) for side in ("train", "val", "test")
    }
    assert {f.path for f in client.list_artifacts(record.run_id)} == {"environment.txt", "lineage.json", "samples"}
    assert (project / "mlartifacts").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_store_that_could_not_be_made_is_made_the_next_time(project: Path, params: Params) -> None:
    """A full disk, or a kill, once left tables of which MLflow says for ever that they are there already."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="tracking store: "):
            connect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (project / "mlflow.db").exists()
    with training_run(params, None, LINEAGE, {}) as record:
        record.metrics([(1, 1000, {"train/loss": 3.0})])
    assert rows(project) == [("train/loss", 1, 3.0)]
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    assert list(project.glob(".mlflow*")) == []


def test_its_description_says_what_counts_and_how_to_come_back(params: Params) -> None:
    with training_run(params, None, LINEAGE, {"device": "cpu"}) as record:
        record.metrics([(1, 1000, {"val/bits_per_byte": 2.5, "train/loss": 3.0})])
        record.tags({"red_flag.overfitting": "overfitting: words"})
    tags = connect().get_run(record.run_id).data.tags
    note = tags["mlflow.note.content"]
    assert "| val/bits_per_byte | 2.5000 |" in note
    assert "Red flags: overfitting: words." in note
    assert f"gptpipe restore {record.run_id}" in note
    assert (tags["environment.device"], len(tags["params_digest"])) == ("cpu", 12)
    assert tags["process"].startswith(f"{os.getpid()} on ")
    experiment = connect().get_experiment_by_name("gptpipe")
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "test/bits_per_byte"


def test_what_a_run_changes_is_told_from_its_commit(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    (project / "params.yaml").write_text("train: {lr: 1.0e-3, betas: [0.9, 0.95]}\nseed: 1\n")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "params.yaml"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    (project / "params.yaml").write_text("train: {lr: 1e-4, betas: [0.9, 0.95]}\nseed: 2\n")
    monkeypatch.setenv("DVC_EXP_NAME", "brave-newt")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "f00ba44" * 5)
    with training_run(params, None, LINEAGE, {}) as record:
        pass
    client = connect()
    tags = client.get_run(record.run_id).data.tags
    assert tags["changed"] == "train.lr=0.0001, seed=2"
    assert tags["sweep"] == "f00ba44: train.lr, seed"
    patch = Path(client.download_artifacts(record.run_id, "reproduce/code.patch")).read_text()
    assert "+train: {lr: 1e-4" in patch


def test_how_busy_the_machine_is_stands_beside_the_curves(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "_SYSTEM_SECONDS", 0.2)
    with training_run(params, None, LINEAGE, {}) as record:
        time.sleep(1.5)
    history = connect().get_metric_history(record.run_id, "system/system_memory_usage_percentage")
    assert len(history) >= 1
    assert all(0 < metric.value <= 100 and metric.step == metric.timestamp // 1000 for metric in history)


def test_a_resumed_run_gets_each_step_once(project: Path, params: Params) -> None:
    """A killed training logged step 3 after its checkpoint at 2; resumed, it logs everything from its journal."""
    with training_run(params, None, LINEAGE, {}) as first:
        first.metrics([(step, step, {"train/loss": float(step)}) for step in (1, 2, 3)])
    with training_run(params, first.run_id, LINEAGE, {}) as second:
        second.metrics([(step, 1000 + step, {"train/loss": float(step)}) for step in (1, 2, 3, 4)])
    assert second.run_id == first.run_id
    assert rows(project) == [("train/loss", step, float(step)) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(("error", "status"), [(Interrupted(15, "saved"), "KILLED"), (ValueError(), "FAILED")])
def test_the_status_says_how_a_training_ended(params: Params, error: Exception, status: str) -> None:
    with pytest.raises(type(error)), training_run(params, None, LINEAGE, {}) as record:
        raise error
    assert connect().get_run(record.run_id).info.status == status


@pytest.mark.parametrize(("error", "flag"), [(NumericError, "not_finite"), (SpikeError, "spike")])
def test_a_loss_that_is_not_finite_or_leaps_is_a_red_flag_of_the_run(
    params: Params, error: type[NumericError], flag: str
) -> None:
    with pytest.raises(NumericError), training_run(params, None, LINEAGE, {}) as record:
        raise error("train: step 3: loss nan")
    run = connect().get_run(record.run_id)
    flags = {name: words for name, words in run.data.tags.items() if name.startswith("red_flag.")}
    assert (run.info.status, flags) == ("FAILED", {f"red_flag.{flag}": "train: step 3: loss nan"})


def test_a_run_names_the_commit_of_its_code(project: Path, params: Params) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with training_run(params, None, LINEAGE, {}) as record:
        pass
    assert connect().get_run(record.run_id).data.tags["mlflow.source.git.commit"] == head


def test_what_a_dead_server_did_not_take_goes_out_later(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:  # a port that refuses
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(record_module, "_RETRY_SECONDS", 0.1)
    with training_run(params, None, LINEAGE, {}) as record:
        record.metrics([(1, 1000, {"train/loss": 3.0})])
        record.tags({"best_step": "1"})
    assert "does not answer" in capsys.readouterr().err
    assert [path.stem for path in (project / ".gptpipe/outbox").glob("*.jsonl")] == [record.run_id]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with training_run(params, None, LINEAGE, {}) as later:
        later.metrics([(1, 1000, {"train/loss": 9.0})])
    assert list((project / ".gptpipe/outbox").iterdir()) == []
    assert rows(project) == [("train/loss", 1, 3.0), ("train/loss", 1, 9.0)]
    client = connect()
    runs = client.search_runs([client.get_experiment_by_name("gptpipe").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.tags.get("best_step", "") for run in runs) == ["", "1"]


def test_a_store_that_is_locked_is_given_up_on_in_seconds_and_nothing_is_lost(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow would wait for 20 seconds in each of its calls."""
    connect()
    monkeypatch.setattr(store_module, "_LOCKED_SECONDS", 0.1)
    with closing(sqlite3.connect(project / "mlflow.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            connect(to_write=True)
        connect()  # who only reads is not kept from it
        with training_run(params, None, LINEAGE, {}) as record:
            record.metrics([(1, 1000, {"train/loss": 3.0})])
        assert [path.stem for path in (project / ".gptpipe/outbox").glob("*.jsonl")] == [record.run_id]
    send_outbox()
    assert rows(project) == [("train/loss", 1, 3.0)]


def test_a_queued_experiment_writes_to_the_main_checkout(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC runs it in a copy with a `.dvc` of its own, and names the main checkout in DVC_ROOT."""
    copy = project / ".dvc" / "tmp" / "exps" / "copy"
    (copy / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setenv("DVC_EXP_NAME", "brave-newt")
    with training_run(params, None, LINEAGE, {}) as record:
        pass
    run = connect().get_run(record.run_id)
    assert (run.info.run_name, run.data.tags["dvc.exp_name"]) == ("brave-newt", "brave-newt")
    assert (project / "mlflow.db").exists()
    assert not (copy / "mlflow.db").exists()

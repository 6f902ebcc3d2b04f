"""The record of a training in a real SQLite store, and what happens if the store fails."""

import json
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
from tiny import LINEAGE, make_model
from toy_registration import evaluate

from gptpipe.base.files import write_bytes
from gptpipe.params import Params
from gptpipe.record import run as record_module
from gptpipe.record import sqlite_store
from gptpipe.record.description import changed_code, describe_run, may_hold_secrets
from gptpipe.record.outbox import send_outbox, with_checksum
from gptpipe.record.run import training_run
from gptpipe.record.store import RunWriter, StoreError, connect, runs_beginning_with
from gptpipe.shell.errors import Interrupted, NumericError, SpikeError

pytestmark = pytest.mark.usefixtures("project")


def rows(project: Path) -> list[tuple[str, int, float]]:
    with sqlite3.connect(project / "mlflow.db") as database:
        return sorted(database.execute("select key, step, value from metrics where key not like 'system/%'"))


def test_a_run_has_parameters_data_metrics_and_texts(project: Path, params: Params) -> None:
    with training_run(params, None, LINEAGE, {"threads": 2}, 1_853_056) as record:
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
    artifacts = {f.path for f in client.list_artifacts(record.run_id)}
    assert artifacts == {"environment.txt", "lineage.json", "samples"}
    assert (project / "mlartifacts").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_store_that_could_not_be_created_is_created_the_next_time(project: Path, params: Params) -> None:
    """A full disk or a kill used to leave partial tables, for which MLflow failed forever."""
    (project / "mlflow.db").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="tracking store: "):
            connect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (project / "mlflow.db").exists()
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.metrics([(1, 1000, {"train/loss": 3.0})])
    assert rows(project) == [("train/loss", 1, 3.0)]
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    assert list(project.glob(".mlflow*")) == []


def test_the_description_of_a_run_has_metrics_red_flags_and_the_command_to_restore_it(params: Params) -> None:
    with training_run(params, None, LINEAGE, {"device": "cpu"}, 1_853_056) as record:
        record.metrics([(1, 1000, {"val/bits_per_byte": 2.5, "train/loss": 3.0})])
        record.tags({"red_flag.overfitting": "overfitting: words"})
    tags = connect().get_run(record.run_id).data.tags
    description = tags["mlflow.note.content"]
    assert "| val/bits_per_byte | 2.5000 |" in description
    assert "Red flags: overfitting: words." in description
    assert f"gptpipe restore {record.run_id}" in description
    assert (tags["environment.device"], len(tags["params_digest"])) == ("cpu", 12)
    assert tags["process"].startswith(f"{os.getpid()} on ")
    experiment = connect().get_experiment_by_name("gptpipe")
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "test/bits_per_byte"


def test_a_tag_without_text_is_removed(params: Params) -> None:
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.tags({"red_flag.lr_too_low": "too low", "red_flag.untrained": "untrained"})
        record.tags({"red_flag.lr_too_low": "", "red_flag.never_set": "", "red_flag.exploding": "exploding"})
    tags = connect().get_run(record.run_id).data.tags
    assert {key for key in tags if key.startswith("red_flag.")} == {"red_flag.untrained", "red_flag.exploding"}
    assert "Red flags: exploding; untrained." in tags["mlflow.note.content"]


def test_tags_name_the_parameters_that_differ_from_the_commit(
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
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        pass
    client = connect()
    run = client.get_run(record.run_id)
    tags = run.data.tags
    assert run.info.run_name == "brave-newt"
    assert tags["changed"] == "train.lr=0.0001, seed=2"
    assert tags["sweep"] == "f00ba44: train.lr, seed"
    patch = Path(client.download_artifacts(record.run_id, "reproduce/code.patch")).read_text()
    assert "+train: {lr: 1e-4" in patch


def test_the_name_of_a_run_says_what_differs_from_the_commit(project: Path, params: Params) -> None:
    def name(n_parameters: int = 1_853_056) -> str:
        return str(describe_run(params, LINEAGE, {}, n_parameters)["name"])

    assert name() == "qwen3-1.9M lr=0.01 seed=1337"
    sizes = (999, 865_536, 123_653_376, 1_543_714_304)
    assert [name(n).split()[0] for n in sizes] == ["qwen3-999", "qwen3-866K", "qwen3-124M", "qwen3-1.5B"]

    (project / "params.yaml").write_text("train: {lr: 1.0e-3}\nseed: 1\nevaluate: {prompts: [a]}\n")
    git("init", "-q")
    git("add", "params.yaml")
    git("commit", "-qm", "first")
    assert name() == "qwen3-1.9M lr=0.01 seed=1337"
    (project / "params.yaml").write_text(
        "train: {lr: 1e-4}\nseed: 1\nevaluate: {prompts: [a, a text of more than 24 characters]}\n"
    )
    assert name() == "qwen3-1.9M lr=0.0001 prompts"
    values = ", ".join(f"p{i}: {i}" for i in range(9))
    (project / "params.yaml").write_text(
        f"train: {{lr: 1.0e-3, {values}}}\nseed: 1\nevaluate: {{prompts: [a]}}\n"
    )
    assert name() == "qwen3-1.9M p0=0 p1=1 p2=2 p3=3 p4=4 p5=5 and 3 more"


def test_a_long_parameter_is_complete_in_an_artifact_and_the_run_says_so(
    params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [("words " * 1500 + ending,) for ending in ("one", "two")]
    values = []
    for texts in prompts:
        long = params.model_copy(update={"train": params.train.model_copy(update={"sample_prompts": texts})})
        with training_run(long, None, LINEAGE, {}, 1_853_056) as record:
            pass
        client = connect()
        values.append(client.get_run(record.run_id).data.params["train.sample_prompts"])
        artifact = Path(client.download_artifacts(record.run_id, "parameters/train.sample_prompts.txt"))
        assert artifact.read_text() == str(list(texts))
    assert values[0].startswith("['words words")
    assert values[0].endswith("the whole value is in the artifact parameters/train.sample_prompts.txt]")
    assert {len(value) for value in values} == {6000}
    assert values[0] != values[1]  # `gptpipe compare` groups runs by their values
    warning = "warning: train.sample_prompts has 9,007 characters, MLflow takes 6,000"
    assert capsys.readouterr().err.count(warning) == 2


@pytest.mark.slow
def test_points_and_the_load_of_the_machine_are_in_the_store_within_15_seconds(
    project: Path, params: Params
) -> None:
    """Nothing else happens in the training meanwhile, such as a validation."""
    load = "system/system_memory_usage_percentage"
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.metrics([(1, 1000, {"train/loss": 3.0})])
        deadline = time.monotonic() + 15
        while not (rows(project) and connect().get_metric_history(record.run_id, load)):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert rows(project) == [("train/loss", 1, 3.0)]
    history = connect().get_metric_history(record.run_id, load)
    assert all(0 < metric.value <= 100 and metric.step == metric.timestamp // 1000 for metric in history)


def test_points_are_sent_together_and_in_order_with_everything_else(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request for each step would cost a hundred times as much as one for many steps."""
    with socket.socket() as unused:  # a port that refuses connections
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        for step in (1, 2, 3):
            record.metrics([(step, 1000, {"train/loss": 3.0})])
        record.tags({"a": "b"})
        record.metrics([(4, 1000, {"train/loss": 3.0})])
    (waiting,) = (project / ".gptpipe/outbox").rglob("*.jsonl")
    # The first tag is that of the program.
    kept = [json.loads(line.partition(" ")[2]) for line in waiting.read_text().splitlines()]
    assert [kind for kind, _ in kept] == ["create", "tags", "metrics", "tags", "metrics", "end"]
    assert [step for kind, points in kept if kind == "metrics" for *_, step in points] == [1, 2, 3, 4]


def test_a_resumed_run_gets_each_step_once(project: Path, params: Params) -> None:
    """A killed training has logged step 3 after its checkpoint at 2; the resumed one logs its whole journal."""
    with training_run(params, None, LINEAGE, {}, 1_853_056) as first:
        first.metrics([(step, step, {"train/loss": float(step)}) for step in (1, 2, 3)])
    with training_run(params, first.run_id, LINEAGE, {}, 1_853_056) as second:
        second.metrics([(step, 1000 + step, {"train/loss": float(step)}) for step in (1, 2, 3, 4)])
    assert second.run_id == first.run_id
    assert rows(project) == [("train/loss", step, float(step)) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(("error", "status"), [(Interrupted(15, "saved"), "KILLED"), (ValueError(), "FAILED")])
def test_the_status_of_a_run_says_how_the_training_ended(params: Params, error: Exception, status: str) -> None:
    with pytest.raises(type(error)), training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        raise error
    assert connect().get_run(record.run_id).info.status == status


@pytest.mark.parametrize(("error", "flag"), [(NumericError, "not_finite"), (SpikeError, "spike")])
def test_a_loss_that_is_not_finite_or_spikes_is_a_red_flag_of_the_run(
    params: Params, error: type[NumericError], flag: str
) -> None:
    with pytest.raises(NumericError), training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        raise error("train: step 3: loss nan")
    run = connect().get_run(record.run_id)
    flags = {name: words for name, words in run.data.tags.items() if name.startswith("red_flag.")}
    assert (run.info.status, flags) == ("FAILED", {f"red_flag.{flag}": "train: step 3: loss nan"})


def test_a_run_names_the_commit_of_its_code(project: Path, params: Params) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        pass
    assert connect().get_run(record.run_id).data.tags["mlflow.source.git.commit"] == head


def test_what_a_dead_server_did_not_take_waits_for_this_server(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:  # a port that refuses connections
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(record_module, "_RETRY_SECONDS", 0.1)
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.metrics([(1, 1000, {"train/loss": 3.0})])
        record.tags({"best_step": "1"})
    assert "does not answer" in capsys.readouterr().err
    assert [path.stem for path in (project / ".gptpipe/outbox").rglob("*.jsonl")] == [record.run_id]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with training_run(params, None, LINEAGE, {}, 1_853_056) as later:
        later.metrics([(1, 1000, {"train/loss": 9.0})])
    assert rows(project) == [("train/loss", 1, 9.0)]  # the record belongs to the server
    (waiting,) = (project / ".gptpipe/outbox").rglob("*.jsonl")
    assert waiting.with_name("store.txt").read_text() == f"experiment gptpipe in http://127.0.0.1:{port}\n"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    send_outbox()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert waiting.exists()
    waiting.rename(project / ".gptpipe/outbox" / waiting.name)  # as the documentation says
    send_outbox()
    assert list((project / ".gptpipe/outbox").rglob("*.jsonl")) == []
    assert rows(project) == [("train/loss", 1, 3.0), ("train/loss", 1, 9.0)]
    client = connect()
    runs = client.search_runs([client.get_experiment_by_name("gptpipe").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.tags.get("best_step", "") for run in runs) == ["", "1"]


def test_a_locked_store_fails_in_seconds_and_nothing_is_lost(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow would wait for 20 seconds in each of its calls."""
    connect()
    monkeypatch.setattr(sqlite_store, "_LOCKED_SECONDS", 0.1)
    with closing(sqlite3.connect(project / "mlflow.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            connect(to_write=True)
        connect()  # readers are not affected
        with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
            record.metrics([(1, 1000, {"train/loss": 3.0})])
        assert [path.stem for path in (project / ".gptpipe/outbox").rglob("*.jsonl")] == [record.run_id]
    send_outbox()
    assert rows(project) == [("train/loss", 1, 3.0)]


def test_a_run_is_found_by_the_beginning_of_its_id(project: Path) -> None:
    client = connect()
    experiment = client.get_experiment_by_name("gptpipe").experiment_id
    one, other = (client.create_run(experiment).info.run_id for _ in range(2))
    assert runs_beginning_with(client, one[:8]) == [one]
    assert runs_beginning_with(client, other[:31]) == [other]
    # Too few digits, another case, and what would be a pattern.
    for name in (one[:3], one[:8].upper() + "F", "%%%%", "____", ""):
        assert runs_beginning_with(client, name) == []


def test_a_queued_experiment_writes_to_the_main_checkout(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC runs it in a copy that has its own `.dvc`; DVC_ROOT is the main checkout."""
    copy = project / ".dvc" / "tmp" / "exps" / "copy"
    (copy / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setenv("DVC_EXP_NAME", "brave-newt")
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        pass
    run = connect().get_run(record.run_id)
    assert (run.info.run_name, run.data.tags["dvc.exp_name"]) == ("brave-newt", "brave-newt")
    assert (project / "mlflow.db").exists()
    assert not (copy / "mlflow.db").exists()


RUN = "0123456789abcdef" * 2
GOOD = ["metrics", [["train/loss", 2.5, 1, 7]]]
DAMAGED_LINES = {
    "cut": json.dumps(GOOD).encode()[:-5],
    "not text": b"\xff\xfe\x00",
    "of no kind": b'["run", "rm -rf /"]',
    "not a pair": b'{"metrics": []}',
    "nested": b"[" * 100_000,
    "a value that is not finite": b'["metrics", [["a", NaN, 1, 7]]]',
    "a value that is text": b'["metrics", [["a", "1", 1, 7]]]',
    "a step beyond the store's column": b'["metrics", [["a", 1.0, 1, 1267650600228229401496703205376]]]',
    "a path that leads out": b'["text", ["../../mlflow.db", "x"]]',
    "a path from the root": b'["text", ["/etc/passwd", "x"]]',
    "a status that is none": b'["end", "RUNNING"]',
    "half a description": b'["create", {"name": null, "tags": {}}]',
}


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES.keys())
def test_a_damaged_line_of_the_outbox_is_set_aside_and_the_rest_is_sent(
    project: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect()
    experiment = client.get_experiment_by_name("gptpipe")
    runs = [client.create_run(experiment.experiment_id).info.run_id for _ in range(2)]
    first, second = sorted(runs)
    good, line = with_checksum(json.dumps(GOOD).encode()), with_checksum(line)
    for name, content in ((first, good + b"\n" + line), (second, good + b"\n"), ("not a run", good)):
        write_bytes(project / f".gptpipe/outbox/{name}.jsonl", content)
    send_outbox()
    assert rows(project) == [("train/loss", 7, 2.5)] * 2
    aside = {path.name: path.read_bytes() for path in (project / ".gptpipe/outbox").iterdir()}
    assert aside == {f"{first}.jsonl.damaged": line, "not a run.jsonl.damaged": good}
    said = capsys.readouterr().err
    assert said.count("warning: ") == 2
    assert f"{first}.jsonl.damaged" in said


def test_a_changed_character_in_the_outbox_is_noticed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is still an operation, so only its checksum shows the damage."""
    line = with_checksum(json.dumps(GOOD).encode()).replace(b"2.5", b"2.7")
    write_bytes(project / f".gptpipe/outbox/{RUN}.jsonl", line)
    send_outbox()
    (aside,) = (project / ".gptpipe/outbox").iterdir()
    assert (aside.name, aside.read_bytes()) == (f"{RUN}.jsonl.damaged", line)
    assert aside.name in capsys.readouterr().err


def test_a_record_that_the_store_always_refuses_does_not_block_the_rest(
    project: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow refuses the first file as its run was deleted, and the first tag as its name is too long."""
    content = with_checksum(json.dumps(GOOD).encode()) + b"\n"
    write_bytes(project / f".gptpipe/outbox/{RUN}.jsonl", content)
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.tags({"x" * 1000: "refused"})
        record.tags({"best_step": "1"})
    run = connect().get_run(record.run_id)
    assert (run.info.status, run.data.tags["best_step"]) == ("FINISHED", "1")
    aside = {path.name: path.read_text() for path in (project / ".gptpipe/outbox").rglob("*.refused")}
    assert aside.pop(f"{RUN}.jsonl.refused").encode() == content
    refused = [json.loads(line.partition(" ")[2]) for line in aside.values()]
    assert refused == [["tags", {"x" * 1000: "refused"}]]
    assert f"it has no run {RUN}" in capsys.readouterr().err


def test_an_unexpected_error_while_tracking_is_reported_and_nothing_is_lost(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write", lambda *_: 1 // 0)
        with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
            record.metrics([(1, 1000, {"train/loss": 3.0})])
    said = capsys.readouterr().err
    assert "warning: tracking stopped (ZeroDivisionError" in said
    assert "Traceback" not in said
    send_outbox()
    assert rows(project) == [("train/loss", 1, 3.0)]
    assert list((project / ".gptpipe/outbox").rglob("*.jsonl")) == []
    assert record.run_id


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
@pytest.mark.parametrize("is_journal_kept", [True, False])
def test_a_store_on_a_full_disk_gives_warnings_and_the_training_ends_normally(
    project: Path, params: Params, capfd: pytest.CaptureFixture[str], is_journal_kept: bool
) -> None:
    connect()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = (project / "mlflow.db").stat().st_size // 2 if is_journal_kept else 50_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
            record.metrics([(step, step, {f"train/{i}": 1.0 for i in range(20)}) for step in range(100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if not line.startswith("warning: ")] == []
    assert any("disk I/O error" in line for line in said)
    if is_journal_kept:
        send_outbox()
        assert len(rows(project)) == 2000
    else:
        assert any("records of this run are lost" in line for line in said)
        assert record.run_id


SECRETS = [
    ".env",
    ".ENV.production",
    "conf/.envrc",
    "prod.env",
    "server.pem",
    "Server.KEY",
    "id_rsa",
    "id_ed25519.pub",
    "aws/Credentials.json",
    ".netrc",
    "keys.p12",
    ".dvc/config.local",
    ".dvc/config",
    ".ssh/known",
    "secrets.yaml",
    "client_secret.json",
    "passwords.txt",
    ".git-credentials",
    ".npmrc",
]
PLAIN = [
    "environment.py",
    "gptpipe/formats/tokenizer.py",
    "keyboard.txt",
    "params.yaml",
    "config",
    "monkey.py",
    "env.py",
]


def test_names_of_files_that_may_contain_secrets() -> None:
    assert [name for name in SECRETS if not may_hold_secrets(name)] == []
    assert [name for name in PLAIN if may_hold_secrets(name)] == []


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments], check=True)


def test_a_patch_has_staged_files_but_none_that_may_contain_secrets(project: Path) -> None:
    for name in ("kept.txt", "old.env", "server.pem", "deep/.env", "plain.txt"):
        write_bytes(project / name, f"{name}: {'canary ' * 50}\n".encode())
    git("init", "-q")
    git("add", "kept.txt", "old.env", "server.pem", "plain.txt")
    git("commit", "-qm", "first")
    git("mv", "old.env", "settings.txt")  # renamed from the name of a secret, and to one
    git("mv", "plain.txt", "now.key")
    write_bytes(project / "server.pem", b"changed canary\n")  # tracked by git
    write_bytes(project / "kept.txt", b"words\n")
    write_bytes(project / "Deep [x]/Staged.ENV", b"canary\n")
    write_bytes(project / "new.txt", b"new words\n")
    git("add", "new.txt", "Deep [x]/Staged.ENV", "deep/.env")
    patch, left_out = changed_code()
    assert patch is not None
    assert "+words" in patch
    assert "+new words" in patch
    assert patch.count("canary") == 50  # the old content of kept.txt
    assert left_out == [
        "Deep [x]/Staged.ENV",
        "deep/.env",
        "now.key",
        "old.env",
        "plain.txt",
        "server.pem",
        "settings.txt",
    ]


def test_no_secret_from_environment_variables_is_recorded(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = (
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "MY_SECRET",
        "DB_PASSWORD",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "WANDB_API_KEY",
    )
    for name in names:
        monkeypatch.setenv(name, f"canary-of-{name}")
    git("init", "-q")
    git("remote", "add", "origin", "https://mary:canary-of-git@example.com/x.git")
    git("commit", "-q", "--allow-empty", "-m", "first")
    write_bytes(project / ".env", b"X=canary-of-env\n")
    git("add", ".env")
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.metrics([(1, 1000, {"train/loss": 3.0})])
    evaluate(params, make_model(project / "models/gpt"), record.run_id, 2.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mary:canary-of-uri@127.0.0.1:9")
    monkeypatch.setattr(record_module, "_START_SECONDS", 0.1)
    with training_run(params, None, LINEAGE, {}, 1_853_056):
        pass
    said = evaluate(params, project / "models/gpt", record.run_id, 2.0) + "".join(capfd.readouterr())
    assert "127.0.0.1" in said
    assert "canary" not in said
    kept = [
        path
        for path in project.rglob("*")
        if path.is_file() and ".git" not in path.parts and path.name != ".env"
    ]
    assert len(kept) > 20
    assert [path for path in kept if b"canary" in path.read_bytes()] == []


def test_a_failing_git_gives_one_warning(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    (project / ".git/HEAD").write_bytes(b"\xff")
    description = describe_run(params, LINEAGE, {}, 1_853_056)
    assert "mlflow.source.git.commit" not in description["tags"]
    assert "reproduce/code.patch" not in description["texts"]
    assert capsys.readouterr().err.startswith("warning: git does not answer")

"""The five stages as a user runs them: `dvc repro`, remotes, faults."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import browser  # noqa: F401  (a fixture)
from campaign.processes import RealProjects, try_out_for_real
from toy_pipeline import digests, documents, run, set_params

pytestmark = pytest.mark.slow

OTHER_REPORTS = ("split", "eval", "train", "mlflow_run")  # outputs of DVC that are no metrics


def test_two_runs_give_the_same_bytes_though_dvc_is_killed_in_the_second(
    reproduced: Path, tmp_path: Path
) -> None:
    """The same files, the same record in MLflow, and nothing left behind."""
    assert len(digests(reproduced)) > 20
    trial = {"kind": "repro", "signal": "SIGKILL", "to": "dvc", "at": 0.6}
    assert try_out_for_real(trial, RealProjects(tmp_path, reproduced))["differences"] == []


def test_a_second_repro_has_nothing_to_do_whatever_was_edited_that_changes_no_result(
    project_copy: Path,
) -> None:
    """The doctor, plan, console and record of a run; files that an editor or Python leaves in a package."""
    package = project_copy / "gptpipe"
    for name in ("commands/doctor.py", "commands/plan.py", "shell/console.py", "record/store.py", "params.py"):
        with (package / name).open("a") as file:
            file.write("# edited\n")
    for stray in (
        "base/files.py~",
        "train/.loop.py.swp",
        "model/__pycache__/gpt.cpython-39.pyc",
        "score/.DS_Store",
    ):
        (package / stray).parent.mkdir(exist_ok=True)
        (package / stray).write_text("stray")
    assert "Data and pipelines are up to date." in run(project_copy, "dvc", "repro").stdout
    with (package / "score/metrics.py").open("a") as file:
        file.write("# edited\n")
    status = run(project_copy, "dvc", "status").stdout
    assert "train:" in status
    assert "collect:" not in status


def test_the_model_names_all_its_ancestors(reproduced: Path) -> None:
    model = json.loads((reproduced / "models/gpt/manifest.json").read_bytes())
    expected = {
        name: hashlib.sha256((reproduced / "data" / name / "manifest.json").read_bytes()).hexdigest()
        for name in ("raw", "tokens", "split")
    }
    source = hashlib.sha256(documents().encode()).hexdigest()
    assert model["made_from"] == {**expected, "data/sources/animals.txt": source}


def test_the_doctor_finds_no_fault_and_then_a_missing_file(project_copy: Path) -> None:
    def doctor() -> tuple[int, dict[str, str]]:
        result = run(project_copy, sys.executable, "-m", "gptpipe.commands.cli", "doctor", check=False)
        return result.returncode, {line[9:21].strip(): line.split()[0] for line in result.stdout.splitlines()}

    code, marks = doctor()
    assert code == 0
    # The user chooses the versions.
    assert {mark for name, mark in marks.items() if name != "versions"} == {"ok"}
    assert len(marks) == 27
    (project_copy / "models/gpt/config.json").unlink()
    code, marks = doctor()
    assert (code, marks["pipeline"], marks["models/gpt"]) == (4, "warning", "error")


def test_metrics_and_plots_are_declared_to_dvc(project_copy: Path) -> None:
    shown = json.loads(run(project_copy, "dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert set(shown) == {"reports/metrics.json"}
    metrics = shown["reports/metrics.json"]["data"]
    assert list(metrics) == [
        *("overlap", "run", "seconds", "test_acc", "test_bpb", "test_bpb_se", "test_ppl"),
        *("tokens", "val_bpb", "val_loss"),
    ]
    reports = {name: json.loads((project_copy / f"reports/{name}.json").read_bytes()) for name in OTHER_REPORTS}
    assert metrics["test_bpb_se"] == reports["eval"]["test"]["bits_per_byte_standard_error"]
    assert metrics["overlap"] == reports["split"]["share"]["test"]
    assert metrics["tokens"] == reports["train"]["tokens"] == 6 * 2 * 16
    assert reports["mlflow_run"]["run_id"].startswith(metrics["run"])
    plots = run(project_copy, "dvc", "plots", "show", "--json").stdout
    for name in ("loss", "learning_rate", "gradient_norm", "loss_by_position", "bits_per_byte_by_source"):
        assert f'"{name}"' in plots


@pytest.mark.browser
def test_the_page_of_plots_is_drawn_without_a_network(project_copy: Path, browser: Any) -> None:  # noqa: F811
    shown = run(project_copy, "dvc", "plots", "show", "-o", "shown").stdout
    assert "<script src" not in (project_copy / "shown/index.html").read_text()
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*"]})
    browser.get(shown.strip().splitlines()[-1])
    assert browser.get_log("browser") == []  # no request was refused, no file is missing
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    drawn = {}
    for plot in browser.find_elements("css selector", "body > div"):
        shapes = plot.find_elements("css selector", "path.line, rect")
        legend = plot.find_element("css selector", ".legend").text.replace("\n", " ")
        drawn[plot.get_attribute("id")] = (
            len(shapes),
            legend,
            all(shape.rect["width"] > 50 for shape in shapes),
        )
    sides = "■ val ■ test"
    assert drawn == {
        "loss": (2, "■ loss ■ val_loss", True),
        "learning_rate": (1, "", True),
        "gradient_norm": (1, "", True),
        "validation_bits_per_byte": (1, "", True),
        "loss_by_position": (10, sides, True),  # 5 groups of positions
        "accuracy_by_position": (10, sides, drawn["accuracy_by_position"][2]),
        "calibration": (2, sides, drawn["calibration"][2]),  # a tiny model may be equally sure of all tokens
        "bits_per_byte_by_source": (2, sides, True),
    }


def test_evaluate_refuses_reports_that_stage_train_did_not_write(project_copy: Path) -> None:
    """It prints one line and exits with code 4. The recommended command helps, and trains nothing again."""
    outputs = digests(project_copy)
    path = project_copy / "reports/train.steps.csv"
    path.unlink()  # it may be a hard link into DVC's cache
    path.write_bytes(b"step,loss\n1,0.1\n")
    result = run(project_copy, sys.executable, "-m", "stages.evaluate", check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (4, 1), result.stderr
    assert "reports/train.steps.csv: " in result.stderr
    assert "`dvc repro` restores it" in result.stderr
    output = run(project_copy, "dvc", "repro").stdout
    assert "Stage 'train' is cached - skipping run, checking out outputs" in output
    assert digests(project_copy) == outputs


def test_the_doctor_repairs_a_lock_file_that_dvc_was_killed_while_writing(project_copy: Path) -> None:
    outputs = digests(project_copy)
    lock = (project_copy / "dvc.lock").read_bytes()
    (project_copy / "dvc.lock").write_bytes(b"")
    assert run(project_copy, "dvc", "repro", check=False).returncode != 0
    result = run(project_copy, sys.executable, "-m", "gptpipe.commands.cli", "doctor", "--fix")
    assert "dvc.lock" in result.stdout
    assert "Running stage 'train'" not in run(project_copy, "dvc", "repro").stdout
    assert digests(project_copy) == outputs
    assert (project_copy / "dvc.lock").read_bytes() == lock


def test_what_is_pushed_to_a_remote_comes_back(project_copy: Path, tmp_path: Path) -> None:
    run(project_copy, "dvc", "remote", "add", "-d", "shelf", str(tmp_path / "shelf"))
    run(project_copy, "dvc", "push")
    outputs = digests(project_copy)
    for lost in (".dvc/cache", "data/raw", "data/tokens", "data/split", "models/gpt"):
        shutil.rmtree(project_copy / lost)
    assert digests(project_copy) != outputs
    run(project_copy, "dvc", "pull")
    assert digests(project_copy) == outputs


def test_each_wrong_parameter_is_one_line(project_copy: Path) -> None:
    set_params(project_copy, {"train.lr": "fast", "train.stride": 0})
    result = run(project_copy, sys.executable, "-m", "stages.train", check=False)
    assert result.returncode == 2
    assert [line.removeprefix("error: ").split(": ")[:2] for line in result.stderr.splitlines()] == [
        ["params.yaml", "train.lr"],
        ["params.yaml", "train.stride"],
    ]


def test_a_flipped_bit_stops_the_stage_that_reads_it(project_copy: Path) -> None:
    stream = project_copy / "data/split/train/tokens.npy"
    content = bytearray(stream.read_bytes())
    content[-1] ^= 1
    stream.unlink()  # it may be a hard link into DVC's cache
    stream.write_bytes(content)
    result = run(project_copy, sys.executable, "-m", "stages.train", check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (4, False)
    assert "data/split/train/tokens.npy" in result.stderr


def test_tokens_of_another_corpus_are_not_split(project_copy: Path) -> None:
    """Otherwise the overlap would describe the documents in data/raw, and the split would contain others."""
    set_params(project_copy, {"collect.max_document_bytes": 64})
    run(project_copy, sys.executable, "-m", "stages.collect")
    result = run(project_copy, sys.executable, "-m", "stages.split", check=False)
    assert result.returncode == 4
    assert "data/tokens: made from another version of data/raw than the current one" in result.stderr

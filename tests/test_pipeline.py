"""The five stages as a user runs them: `dvc repro`, remotes, faults."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import browser  # noqa: F401  (a fixture)
from toy_pipeline import digests, documents, make_project, run, set_params


def test_two_runs_give_the_same_bytes(reproduced: Path, tmp_path: Path) -> None:
    other = make_project(tmp_path)
    run(other, "dvc", "repro")
    made = digests(reproduced)
    assert len(made) > 20
    assert digests(other) == made


def test_a_second_repro_has_nothing_to_do(reproduced: Path) -> None:
    assert "Data and pipelines are up to date." in run(reproduced, "dvc", "repro").stdout


def test_every_artefact_names_its_ancestors(reproduced: Path) -> None:
    model = json.loads((reproduced / "models/gpt/manifest.json").read_bytes())
    expected = {
        name: hashlib.sha256((reproduced / "data" / name / "manifest.json").read_bytes()).hexdigest()
        for name in ("raw", "tokens", "split")
    }
    source = hashlib.sha256(documents().encode()).hexdigest()
    assert model["made_from"] == {**expected, "data/sources/animals.txt": source}


def test_the_doctor_finds_nothing_then_what_was_changed(reproduced: Path, tmp_path: Path) -> None:
    def doctor() -> tuple[int, dict[str, str]]:
        result = run(project, sys.executable, "-m", "gptpipe.commands.cli", "doctor", check=False)
        return result.returncode, {line[9:21].strip(): line.split()[0] for line in result.stdout.splitlines()}

    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    code, marks = doctor()
    assert code == 0
    assert {mark for name, mark in marks.items() if name != "versions"} == {"ok"}  # of versions, the user's choice
    assert len(marks) == 24
    (project / "models/gpt/config.json").unlink()
    code, marks = doctor()
    assert (code, marks["pipeline"], marks["models/gpt"]) == (4, "warning", "error")


def test_figures_are_declared_to_dvc(reproduced: Path) -> None:
    shown = json.loads(run(reproduced, "dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert {f"reports/{name}.json" for name in ("split", "eval", "train", "mlflow_run")} == set(shown)
    assert shown["reports/eval.json"]["data"]["val"]["bits_per_byte"] > 0
    plots = run(reproduced, "dvc", "plots", "show", "--json").stdout
    for name in ("loss", "learning_rate", "gradient_norm", "loss_by_position", "bits_per_byte_by_source"):
        assert f'"{name}"' in plots


@pytest.mark.browser
def test_the_page_of_plots_is_drawn_without_a_network(reproduced: Path, browser: Any) -> None:  # noqa: F811
    shown = run(reproduced, "dvc", "plots", "show", "-o", "shown").stdout
    assert "<script src" not in (reproduced / "shown/index.html").read_text()
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*"]})
    browser.get(shown.strip().splitlines()[-1])
    assert browser.get_log("browser") == []  # nothing refused, nothing missing
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    drawn = {}
    for plot in browser.find_elements("css selector", "body > div"):
        shapes = plot.find_elements("css selector", "path.line, rect")
        legend = plot.find_element("css selector", ".legend").text.replace("\n", " ")
        drawn[plot.get_attribute("id")] = (len(shapes), legend, all(shape.rect["width"] > 50 for shape in shapes))
    sides = "■ val ■ test"
    assert drawn == {
        "loss": (2, "■ loss ■ val_loss", True),
        "learning_rate": (1, "", True),
        "gradient_norm": (1, "", True),
        "validation_bits_per_byte": (1, "", True),
        "loss_by_position": (2, sides, True),
        "accuracy_by_position": (2, sides, True),
        "calibration": (2, sides, drawn["calibration"][2]),  # a tiny model may be equally sure of everything
        "bits_per_byte_by_source": (2, sides, True),
    }


def test_evaluate_refuses_reports_that_stage_train_did_not_write(reproduced: Path, tmp_path: Path) -> None:
    """One line and exit code 4; what it recommends helps, and trains nothing anew."""
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    made = digests(project)
    for name, content in (("train.steps.csv", b"step,loss\n1,0.1\n"), ("mlflow_run.json", b'{"run_id": "' + b"0" * 20)):
        path = project / "reports" / name
        path.unlink()  # a hard link into DVC's cache stays as it was
        path.write_bytes(content)
        result = run(project, sys.executable, "-m", "stages.evaluate", check=False)
        assert (result.returncode, len(result.stderr.splitlines())) == (4, 1), result.stderr
        assert f"reports/{name}: " in result.stderr
        assert "`dvc repro` restores it" in result.stderr
    output = run(project, "dvc", "repro").stdout
    assert "Stage 'train' is cached - skipping run, checking out outputs" in output
    assert digests(project) == made


def test_the_doctor_helps_after_a_kill_while_dvc_writes_its_lock(reproduced: Path, tmp_path: Path) -> None:
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    made, lock = digests(project), (project / "dvc.lock").read_bytes()
    (project / "dvc.lock").write_bytes(b"")
    assert run(project, "dvc", "repro", check=False).returncode != 0
    result = run(project, sys.executable, "-m", "gptpipe.commands.cli", "doctor", check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (4, False)
    assert "dvc.lock: damaged (it is empty)" in result.stdout
    run(project, sys.executable, "-m", "gptpipe.commands.cli", "doctor", "--fix")
    assert "Running stage 'train'" not in run(project, "dvc", "repro").stdout
    assert digests(project) == made
    assert (project / "dvc.lock").read_bytes() == lock


def test_what_is_pushed_to_a_remote_comes_back(reproduced: Path, tmp_path: Path) -> None:
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    run(project, "dvc", "remote", "add", "-d", "shelf", str(tmp_path / "shelf"))
    run(project, "dvc", "push")
    made = digests(project)
    for lost in (".dvc/cache", "data/raw", "data/tokens", "data/split", "models/gpt"):
        shutil.rmtree(project / lost)
    assert digests(project) != made
    run(project, "dvc", "pull")
    assert digests(project) == made


def test_a_wrong_parameter_is_told_in_one_line(reproduced: Path, tmp_path: Path) -> None:
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    set_params(project, {"train.lr": "fast", "train.stride": 0})
    result = run(project, sys.executable, "-m", "stages.train", check=False)
    assert result.returncode == 2
    assert [line.removeprefix("error: ").split(": ")[:2] for line in result.stderr.splitlines()] == [
        ["params.yaml", "train.lr"],
        ["params.yaml", "train.stride"],
    ]


def test_a_flipped_bit_stops_the_stage_that_reads_it(reproduced: Path, tmp_path: Path) -> None:
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    stream = project / "data/split/train/tokens.npy"
    content = bytearray(stream.read_bytes())
    content[-1] ^= 1
    stream.unlink()  # a hard link into DVC's cache stays as it was
    stream.write_bytes(content)
    result = run(project, sys.executable, "-m", "stages.train", check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (4, False)
    assert "data/split/train/tokens.npy" in result.stderr


def test_tokens_of_another_corpus_are_not_split(reproduced: Path, tmp_path: Path) -> None:
    """The overlap would be of the documents in data/raw, the split of others."""
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    set_params(project, {"collect.max_document_bytes": 64})
    run(project, sys.executable, "-m", "stages.collect")
    result = run(project, sys.executable, "-m", "stages.split", check=False)
    assert result.returncode == 4
    assert "data/tokens: made from another version of data/raw than the current one" in result.stderr

"""The five stages as a user runs them, on a dozen documents made here: `dvc repro`, experiments, faults."""

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from browser import browser  # noqa: F401  (a fixture)
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SECTIONS = {
    "collect.sources": '[{kind: text, paths: ["data/sources/*.txt"], document: separator, separator: "\\n\\n\\n"}]',
    "tokenize.vocab_size": 300,
    "split.val_fraction": 0.3,
    "split.test_fraction": 0.3,
    "model.context_length": 16,
    "model.n_layer": 1,
    "model.n_embd": 16,
    "model.n_inner": 32,
    "train.stride": 16,
    "train.batch_size": 2,
    "train.warmup_steps": 2,
    "train.max_steps": 6,
    "train.eval_every": 3,
    "train.save_every": 3,
    "train.sample_tokens": 4,
    "evaluate.max_new_tokens": 4,
    "evaluate.continuation_tokens": 4,
}
MADE = ("data/raw", "data/tokens", "data/split", "models/gpt", "reports/eval.json", "reports/train.json",
        "reports/train.steps.csv", "reports/train.validations.csv", "reports/samples.md")  # fmt: skip


def documents() -> str:
    """A dozen documents of some sentences each, different from one another."""
    animals = ["cat", "dog", "owl", "fox", "cow", "hen", "bee", "ant", "eel", "emu", "yak", "elk"]
    places = ["garden", "river", "forest", "valley"]
    return "\n\n\n".join(
        " ".join(
            f"On day {day} the {animal} walked from the {places[day % 4]} to the {places[i % 4]}." for day in range(6)
        )
        for i, animal in enumerate(animals)
    )


def environment() -> dict[str, str]:
    """Ours, with the interpreter of the tests first on the path and nothing of an outer DVC or MLflow."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "GPTPIPE_"))}
    return {**outer, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{outer['PATH']}", "OMP_NUM_THREADS": "1"}


def run(project: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def make_project(folder: Path) -> Path:
    """A clone of this project, as committed or not, with tiny parameters and a corpus of its own."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    made = {"dvc.lock", *(f"reports/{name}.json" for name in ("split", "eval", "train", "mlflow_run"))}
    for name in sorted(set(listed.stdout.splitlines()) - made):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "data/sources/animals.txt").write_text(documents())
    for arguments in (["init", "-q"], ["config", "user.email", "t@example.com"], ["config", "user.name", "t"]):
        run(folder, "git", *arguments)
    set_params(folder, SECTIONS)
    commit(folder)
    return folder


def set_params(project: Path, values: dict[str, object]) -> None:
    """Change values of params.yaml, its comments kept."""
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text())
    for name, value in values.items():
        section, key = name.split(".")
        params[section][key] = yaml.load(value) if isinstance(value, str) else value
    with (project / "params.yaml").open("w") as file:
        yaml.dump(params, file)


def commit(project: Path) -> None:
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "state")


def digests(project: Path) -> dict[str, str]:
    """SHA-256 of all that the stages make and that must not differ between two runs."""
    files = [file for name in MADE for file in sorted([project / name, *(project / name).rglob("*")]) if file.is_file()]
    return {file.relative_to(project).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after its first `dvc repro`, committed."""
    project = make_project(tmp_path_factory.mktemp("project"))
    run(project, "dvc", "repro")
    commit(project)
    return project


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
        result = run(project, sys.executable, "-m", "gptpipe.cli", "doctor", check=False)
        return result.returncode, {line[9:21].strip(): line.split()[0] for line in result.stdout.splitlines()}

    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    code, marks = doctor()
    assert code == 0
    assert {mark for name, mark in marks.items() if name != "versions"} == {"ok"}  # of versions, the user's choice
    assert len(marks) == 16
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


@pytest.mark.parametrize("how", [[], ["--temp"]], ids=["in place", "temp"])
def test_an_experiment_reruns_train_and_evaluate_only(reproduced: Path, tmp_path: Path, how: list[str]) -> None:
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    output = run(project, "dvc", "exp", "run", *how, "-S", "train.lr=1e-4").stdout
    assert "Running stage 'train'" in output
    assert "Running stage 'evaluate'" in output
    for stage in ("collect", "tokenize", "split"):
        assert f"Running stage '{stage}'" not in output
    assert len(finished_runs(project)) == 2  # the experiment and the run before it, in the one store at the root


def finished_runs(project: Path) -> list[str]:
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        return [row[0] for row in database.execute("select run_uuid from runs where status = 'FINISHED'")]


@pytest.mark.parametrize("how", [[], ["--temp"]], ids=["in place", "temp"])
def test_a_run_comes_back_with_its_code_parameters_data_and_model(
    reproduced: Path, tmp_path: Path, how: list[str]
) -> None:
    """By the command that its description in MLflow gives, also when the workspace has moved on since."""
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    with (project / "gptpipe/errors.py").open("a") as file:
        file.write("# a change that is in no commit\n")
    run(project, "dvc", "exp", "run", *how, "-n", "tried", "-S", "train.lr=1e-4")
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        query = "select t.key, t.value from tags t join tags n using (run_uuid) where n.value = 'tried'"
        found = dict(database.execute(query).fetchall())
    assert found["changed"] == "train.lr=0.0001"
    assert found["sweep"].endswith(": train.lr")
    command = found["mlflow.note.content"].split("    gptpipe restore ")[1].split()
    if how:
        run(project, "dvc", "exp", "apply", "tried")
    made = digests(project)
    run(project, "git", "stash", "-q")
    run(project, "dvc", "checkout")
    run(project, sys.executable, "-m", "gptpipe.cli", "restore", *command)
    restored = tmp_path / f"copy-{command[0][:8]}"
    assert (restored / "gptpipe/errors.py").read_text().endswith("# a change that is in no commit\n")
    trained = {
        name: digest for name, digest in made.items() if not name.startswith(("reports/eval", "reports/samples"))
    }
    assert len(trained) > 15
    assert {name: digest for name, digest in digests(restored).items() if name in trained} == trained
    assert "Running stage 'train'" not in run(restored, "dvc", "repro").stdout
    assert digests(restored) == made


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


@pytest.mark.slow
def test_queued_experiments_run_side_by_side_into_one_store(reproduced: Path, tmp_path: Path) -> None:
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    run(project, "dvc", "exp", "run", "--queue", "-S", "train.lr=choice(1e-4,2e-4)")
    run(project, "dvc", "exp", "run", "--run-all", "-j", "2")
    shown = run(project, "dvc", "exp", "show", "--json").stdout
    assert len(finished_runs(project)) == 3
    assert all(run_id in shown for run_id in finished_runs(project))


LONGER = [f"-Strain.{name}" for name in ("max_steps=600", "eval_every=200", "save_every=20")]


@pytest.fixture(scope="module")
def longer(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a longer training makes where nothing disturbs it."""
    project = tmp_path_factory.mktemp("undisturbed") / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    run(project, "dvc", "exp", "run", *LONGER)
    return digests(project)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--temp", "--queue"])
def test_an_experiment_that_is_killed_in_training_goes_on_bit_for_bit(
    reproduced: Path, longer: dict[str, str], tmp_path: Path, how: str
) -> None:
    """Its workspace is lost; the checkpoints are in the project."""
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)

    def experiment(name: str) -> list[str]:
        if how == "--temp":
            return ["dvc", "exp", "run", how, "-n", name, *LONGER]
        run(project, "dvc", "exp", "run", how, "-n", name, *LONGER)
        return ["dvc", "exp", "run", "--run-all"]

    with (tmp_path / "said").open("w") as said:
        killed = subprocess.Popen(experiment("first"), cwd=project, env=environment(), stdout=said, stderr=said)
        while not (saved := list(project.glob(".gptpipe/checkpoints/*/step-*"))) and killed.poll() is None:
            time.sleep(0.002)
        assert saved, (tmp_path / "said").read_text()
        folder = saved[0].parent
        os.kill(int((folder / "owner").read_text().removeprefix("process ")), signal.SIGKILL)
        killed.wait(120)
    assert list(folder.glob("step-*"))
    if how == "--queue":  # DVC waits for ever if it is told to go on while a worker is about to end
        statuses = (run(project, "dvc", "queue", "status").stdout for _ in range(60))
        assert any("0 active, 0 idle" in status for status in statuses)
    run(project, *experiment("again"))
    assert not list(folder.glob("step-*"))
    assert len(finished_runs(project)) == 2  # the one before, and the one that was taken up again
    run(project, "dvc", "exp", "apply", "again")
    assert len(longer) > 20
    assert digests(project) == longer


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
    assert "data/tokens: not made from what data/raw holds now" in result.stderr

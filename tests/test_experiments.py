"""`dvc exp run` as a user runs it: in place, with `--temp` and `--queue`; resumed after a kill, and restored."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from toy_pipeline import digests, environment, run

in_place_and_temp = pytest.mark.parametrize("options", [[], ["--temp"]], ids=["in place", "temp"])


@pytest.fixture
def project(reproduced: Path, tmp_path: Path) -> Path:
    """A copy of the project after its first `dvc repro`."""
    copy = tmp_path / "copy"
    shutil.copytree(reproduced, copy, symlinks=True)
    return copy


@in_place_and_temp
def test_experiment_reruns_train_and_evaluate_only(project: Path, options: list[str]) -> None:
    output = run(project, "dvc", "exp", "run", *options, "-S", "train.lr=1e-4").stdout
    assert "Running stage 'train'" in output
    assert "Running stage 'evaluate'" in output
    for stage in ("collect", "tokenize", "split"):
        assert f"Running stage '{stage}'" not in output
    assert len(finished_runs(project)) == 2  # the first run and the experiment, in the store at the root


def finished_runs(project: Path) -> list[str]:
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        return [row[0] for row in database.execute("select run_uuid from runs where status = 'FINISHED'")]


@in_place_and_temp
def test_run_is_restored_with_its_code_parameters_data_and_model(
    project: Path, tmp_path: Path, options: list[str]
) -> None:
    """With the command in its MLflow description, and although the workspace has changed since."""
    with (project / "gptpipe/shell/errors.py").open("a") as file:
        file.write("# a change that is in no commit\n")
    run(project, "dvc", "exp", "run", *options, "-n", "tried", "-S", "train.lr=1e-4")
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        query = "select t.key, t.value from tags t join tags n using (run_uuid) where n.value = 'tried'"
        tags = dict(database.execute(query).fetchall())
    assert tags["changed"] == "train.lr=0.0001"
    assert tags["sweep"].endswith(": train.lr")
    arguments = tags["mlflow.note.content"].split("    gptpipe restore ")[1].split()
    if options:
        run(project, "dvc", "exp", "apply", "tried")
    made = digests(project)
    run(project, "git", "stash", "-q")
    run(project, "dvc", "checkout")
    run(project, sys.executable, "-m", "gptpipe.commands.cli", "restore", *arguments)
    restored = tmp_path / f"copy-{arguments[0][:8]}"
    assert (restored / "gptpipe/shell/errors.py").read_text().endswith("# a change that is in no commit\n")
    of_evaluate = ("reports/eval", "reports/samples")
    trained = {name: digest for name, digest in made.items() if not name.startswith(of_evaluate)}
    assert len(trained) > 15
    assert {name: digest for name, digest in digests(restored).items() if name in trained} == trained
    assert "Running stage 'train'" not in run(restored, "dvc", "repro").stdout
    assert digests(restored) == made


@pytest.mark.slow
def test_two_queued_experiments_at_a_time_share_one_store(project: Path) -> None:
    run(project, "dvc", "exp", "run", "--queue", "-S", "train.lr=choice(1e-4,2e-4)")
    run(project, "dvc", "exp", "run", "--run-all", "-j", "2")
    shown = run(project, "dvc", "exp", "show", "--json").stdout
    assert len(finished_runs(project)) == 3
    assert all(run_id in shown for run_id in finished_runs(project))


LONGER = ["train", *(f"-Strain.{name}" for name in ("max_steps=600", "eval_every=200", "save_every=20"))]


@pytest.fixture(scope="module")
def longer(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the outputs of a longer training that is not interrupted."""
    project = tmp_path_factory.mktemp("uninterrupted") / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    run(project, "dvc", "exp", "run", *LONGER)
    return digests(project)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--temp", "--queue"])
def test_killed_experiment_resumes_bit_for_bit(
    project: Path, longer: dict[str, str], tmp_path: Path, option: str
) -> None:
    """Its workspace is lost, but its checkpoints are in the project."""

    def experiment(name: str) -> list[str]:
        command = ["dvc", "exp", "run", option, "-n", name, *LONGER]
        if option == "--temp":
            return command
        run(project, *command)
        return ["dvc", "exp", "run", "--run-all"]

    with (tmp_path / "output").open("w") as output:
        dvc = subprocess.Popen(experiment("first"), cwd=project, env=environment(), stdout=output, stderr=output)
        checkpoints: list[Path] = []
        while not checkpoints and dvc.poll() is None:
            time.sleep(0.002)
            checkpoints = list(project.glob(".gptpipe/checkpoints/*/step-*"))
        assert checkpoints, (tmp_path / "output").read_text()
        folder = checkpoints[0].parent
        holder = folder.with_name(f".{folder.name}.lock").read_text()  # "process 1234 on ..."
        os.kill(int(holder.split()[1]), signal.SIGKILL)
        dvc.wait(120)
    assert list(folder.glob("step-*"))
    if option == "--queue":  # DVC waits for ever if `--run-all` starts while a worker is about to end
        statuses = (run(project, "dvc", "queue", "status").stdout for _ in range(60))
        assert any("0 active, 0 idle" in status for status in statuses)
    run(project, *experiment("again"))
    assert (folder / "finished.json").exists()
    assert len(finished_runs(project)) == 2  # the first run, and the resumed one
    run(project, "dvc", "exp", "apply", "again")
    assert len(longer) > 20
    assert digests(project) == longer

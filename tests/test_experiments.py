"""`dvc exp run` as a user runs it: in place, by `--temp` and by `--queue`; taken up again, and brought back."""

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
    with (project / "gptpipe/shell/errors.py").open("a") as file:
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
    run(project, sys.executable, "-m", "gptpipe.commands.cli", "restore", *command)
    restored = tmp_path / f"copy-{command[0][:8]}"
    assert (restored / "gptpipe/shell/errors.py").read_text().endswith("# a change that is in no commit\n")
    trained = {
        name: digest for name, digest in made.items() if not name.startswith(("reports/eval", "reports/samples"))
    }
    assert len(trained) > 15
    assert {name: digest for name, digest in digests(restored).items() if name in trained} == trained
    assert "Running stage 'train'" not in run(restored, "dvc", "repro").stdout
    assert digests(restored) == made


@pytest.mark.slow
def test_queued_experiments_run_side_by_side_into_one_store(reproduced: Path, tmp_path: Path) -> None:
    project = tmp_path / "copy"
    shutil.copytree(reproduced, project, symlinks=True)
    run(project, "dvc", "exp", "run", "--queue", "-S", "train.lr=choice(1e-4,2e-4)")
    run(project, "dvc", "exp", "run", "--run-all", "-j", "2")
    shown = run(project, "dvc", "exp", "show", "--json").stdout
    assert len(finished_runs(project)) == 3
    assert all(run_id in shown for run_id in finished_runs(project))


LONGER = ["train", *(f"-Strain.{name}" for name in ("max_steps=600", "eval_every=200", "save_every=20"))]


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
        holder = folder.with_name(f".{folder.name}.lock").read_text()  # "process 1234 on ..."
        os.kill(int(holder.split()[1]), signal.SIGKILL)
        killed.wait(120)
    assert list(folder.glob("step-*"))
    if how == "--queue":  # DVC waits for ever if it is told to go on while a worker is about to end
        statuses = (run(project, "dvc", "queue", "status").stdout for _ in range(60))
        assert any("0 active, 0 idle" in status for status in statuses)
    run(project, *experiment("again"))
    assert (folder / "finished.json").exists()
    assert len(finished_runs(project)) == 2  # the one before, and the one that was taken up again
    run(project, "dvc", "exp", "apply", "again")
    assert len(longer) > 20
    assert digests(project) == longer

"""`dvc exp run` as a user runs it: in place, with `--temp` and with `--queue`; experiments resumed and restored."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from toy_pipeline import copy_project, digests, environment, run

pytestmark = pytest.mark.slow  # each test runs stages train and evaluate, mostly more than once


@pytest.mark.parametrize("how", [[], ["--temp"]], ids=["in place", "temp"])
def test_an_experiment_reruns_train_and_evaluate_only_and_can_be_restored(
    project_copy: Path, tmp_path: Path, how: list[str]
) -> None:
    """The command in the run's MLflow description restores code, parameters, data and model, whatever changed since."""
    project = project_copy
    with (project / "gptpipe/shell/errors.py").open("a") as file:
        file.write("# a change that is in no commit\n")
    output = run(project, "dvc", "exp", "run", *how, "-n", "tried", "-S", "train.lr=1e-4").stdout
    assert "Running stage 'train'" in output
    assert "Running stage 'evaluate'" in output
    for stage in ("collect", "tokenize", "split"):
        assert f"Running stage '{stage}'" not in output
    assert len(finished_runs(project)) == 2  # the run of `reproduced` and the experiment, in the project's one store

    tags = tags_of_run(project, "tried")
    assert tags["changed"] == "train.lr=0.0001"
    assert tags["sweep"].endswith(": train.lr")
    command = tags["mlflow.note.content"].split("    gptpipe restore ")[1].split()
    if how:
        run(project, "dvc", "exp", "apply", "tried")
    outputs = digests(project)
    run(project, "git", "stash", "-q")
    run(project, "dvc", "checkout")
    run(project, sys.executable, "-m", "gptpipe.commands.cli", "restore", *command)

    restored = tmp_path / f"copy-{command[0][:8]}"
    assert (restored / "gptpipe/shell/errors.py").read_text().endswith("# a change that is in no commit\n")
    of_evaluate = ("reports/eval", "reports/samples")
    expected = {name: digest for name, digest in outputs.items() if not name.startswith(of_evaluate)}
    assert len(expected) > 15
    assert {name: digest for name, digest in digests(restored).items() if name in expected} == expected
    assert "Running stage 'train'" not in run(restored, "dvc", "repro").stdout
    assert digests(restored) == outputs


def finished_runs(project: Path) -> list[str]:
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        return [row[0] for row in database.execute("select run_uuid from runs where status = 'FINISHED'")]


def tags_of_run(project: Path, name: str) -> dict[str, str]:
    query = "select t.key, t.value from tags t join tags n using (run_uuid) where n.value = ?"
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        return dict(database.execute(query, (name,)).fetchall())


LONGER = ["train", *(f"-Strain.{name}" for name in ("max_steps=600", "eval_every=200", "save_every=20"))]


@pytest.fixture(scope="module")
def longer(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outputs of a longer training that is not interrupted."""
    project = copy_project(reproduced, tmp_path_factory.mktemp("undisturbed") / "copy")
    run(project, "dvc", "exp", "run", *LONGER)
    return digests(project)


def kill_in_training(project: Path, command: list[str]) -> Path:
    """Run an experiment and kill its stage train after the first checkpoint. Returns the folder of checkpoints."""
    output = project.with_name("output")
    with output.open("w") as file:
        experiment = subprocess.Popen(command, cwd=project, env=environment(), stdout=file, stderr=file)
        while not (saved := list(project.glob(".gptpipe/checkpoints/*/step-*"))) and experiment.poll() is None:
            time.sleep(0.002)
        assert saved, output.read_text()
        folder = saved[0].parent
        holder = folder.with_name(f".{folder.name}.lock").read_text()  # "process 1234 on ..."
        os.kill(int(holder.split()[1]), signal.SIGKILL)
        experiment.wait(120)
    assert list(folder.glob("step-*"))
    return folder


def test_an_experiment_in_a_temporary_workspace_resumes_bit_for_bit_after_a_kill(
    project_copy: Path, longer: dict[str, str]
) -> None:
    """DVC removes the workspace of a failed experiment; the checkpoints are in the project."""
    command = ["dvc", "exp", "run", "--temp", *LONGER, "-n"]
    folder = kill_in_training(project_copy, [*command, "first"])
    run(project_copy, *command, "again")
    assert (folder / "finished.json").exists()
    assert len(finished_runs(project_copy)) == 2  # the run of `reproduced`, and the resumed one
    run(project_copy, "dvc", "exp", "apply", "again")
    assert len(longer) > 20
    assert digests(project_copy) == longer


def test_a_queued_experiment_resumes_bit_for_bit_beside_a_sweep(project_copy: Path, longer: dict[str, str]) -> None:
    """The queue runs again with two jobs: they resume the killed experiment and run a sweep of two learning rates."""
    queue, run_all = ["dvc", "exp", "run", "--queue"], ["dvc", "exp", "run", "--run-all"]
    run(project_copy, *queue, "-n", "first", *LONGER)
    folder = kill_in_training(project_copy, run_all)
    # `--run-all` waits for ever if it starts while a worker of the queue is about to end.
    statuses = (run(project_copy, "dvc", "queue", "status").stdout for _ in range(60))
    assert any("0 active, 0 idle" in status for status in statuses)
    run(project_copy, *queue, "-n", "again", *LONGER)
    run(project_copy, *queue, "-S", "train.lr=choice(1e-4,2e-4)")
    run(project_copy, *run_all, "-j", "2")
    assert (folder / "finished.json").exists()
    runs = finished_runs(project_copy)
    assert len(runs) == 4  # the run of `reproduced`, the resumed one, and two of the sweep
    shown = run(project_copy, "dvc", "exp", "show", "--json").stdout
    assert all(run_id in shown for run_id in runs)
    run(project_copy, "dvc", "exp", "apply", "again")
    assert digests(project_copy) == longer

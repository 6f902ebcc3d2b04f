"""`dvc exp run` as users run it: in place, with `--temp`, with `--queue`; experiments resumed and restored.

The MLflow run id of a result follows it wherever DVC and git take the result.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from toy_pipeline import commit, copy_project, digests, environment, finished_runs, run, set_params

pytestmark = pytest.mark.slow  # each test runs stages train and evaluate, mostly more than once

# So many steps that a kill after the first checkpoint interrupts the training.
CHANGE = ("-S", "train.max_steps=60")
EDITED_FILE = "gptpipe/shell/errors.py"
EDIT = "# a change that is in no commit\n"


class Experiment(NamedTuple):
    """A project after an experiment in place that was not interrupted."""

    project: Path  # its result is in the workspace and not committed; tests copy it
    output: str  # of `dvc exp run`
    digests: dict[str, str]
    of_the_commit: str  # run id of the result in the commit
    run_id: str  # of the experiment's result


@pytest.fixture(scope="module")
def in_place(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    project = copy_project(reproduced, tmp_path_factory.mktemp("in_place") / "copy")
    edit_without_commit(project)
    before = run_id(project)
    output = run(project, "dvc", "exp", "run", "-n", "tried", *CHANGE).stdout
    return Experiment(project, output, digests(project), before, run_id(project))


@pytest.fixture
def tried(in_place: Experiment, tmp_path: Path) -> Path:
    """A copy of the project that the test may change."""
    return copy_project(in_place.project, tmp_path / "copy")


def run_id(project: Path) -> str:
    """The run id in the workspace, which the metrics that DVC shows must name too."""
    content = json.loads((project / "reports/mlflow_run.json").read_bytes())
    shown = json.loads((project / "reports/metrics.json").read_bytes())["run"]
    assert content["run_id"].startswith(shown)
    assert len(shown) == 8
    return str(content["run_id"])


def edit_without_commit(project: Path) -> None:
    with (project / EDITED_FILE).open("a") as file:
        file.write(EDIT)


def test_an_experiment_in_place_reruns_train_and_evaluate_only_and_can_be_restored(
    in_place: Experiment, tried: Path
) -> None:
    check_only_train_and_evaluate_ran(in_place.output)
    assert len(in_place.digests) > 20
    assert finished_runs(tried) == {in_place.of_the_commit, in_place.run_id}
    assert tags_of_run(tried, in_place.run_id)["dvc.exp_name"] == "tried"
    check_restore(tried, in_place.run_id, in_place.digests)


def test_the_run_id_follows_checkout_and_apply(in_place: Experiment, tried: Path) -> None:
    go_to_the_commit(tried)
    assert run_id(tried) == in_place.of_the_commit
    run(tried, "dvc", "exp", "apply", "tried")
    assert run_id(tried) == in_place.run_id


def test_the_run_id_follows_branches(in_place: Experiment, tried: Path) -> None:
    run(tried, "git", "checkout", "-q", "-b", "another")
    commit(tried)
    run(tried, "git", "checkout", "-q", "-")
    run(tried, "dvc", "checkout")
    assert run_id(tried) == in_place.of_the_commit
    run(tried, "git", "checkout", "-q", "another")
    run(tried, "dvc", "checkout")
    assert run_id(tried) == in_place.run_id


def test_the_run_id_follows_the_run_cache(in_place: Experiment, tried: Path) -> None:
    """The same parameters again: DVC takes the result from its cache, and nothing is trained or recorded."""
    go_to_the_commit(tried)
    set_params(tried, {"train.max_steps": 60})
    output = run(tried, "dvc", "repro").stdout
    assert "Stage 'train' is cached" in output
    assert "Stage 'evaluate' is cached" in output
    assert run_id(tried) == in_place.run_id
    assert finished_runs(tried) == {in_place.of_the_commit, in_place.run_id}


def test_an_experiment_in_a_temporary_workspace_resumes_bit_for_bit_after_a_kill(
    project_copy: Path, in_place: Experiment
) -> None:
    """DVC removes the workspace of a failed experiment; the checkpoints and the store are in the project."""
    edit_without_commit(project_copy)
    before = finished_runs(project_copy)
    command = ["dvc", "exp", "run", "--temp", *CHANGE, "-n"]
    checkpoints = kill_in_training(project_copy, [*command, "first"])
    check_only_train_and_evaluate_ran(run(project_copy, *command, "again").stdout)
    assert not checkpoints.exists()  # stage evaluate removes those of a finished training
    (resumed,) = finished_runs(project_copy) - before
    assert tags_of_run(project_copy, resumed)["dvc.exp_name"] == "first"  # of the killed run
    run(project_copy, "dvc", "exp", "apply", "again")
    assert digests(project_copy) == in_place.digests


def test_a_queued_experiment_resumes_bit_for_bit_beside_a_sweep(
    project_copy: Path, in_place: Experiment
) -> None:
    """The queue runs again with two jobs: they resume the killed experiment and try another learning rate."""
    queue, run_all = ["dvc", "exp", "run", "--queue"], ["dvc", "exp", "run", "--run-all"]
    run(project_copy, *queue, "-n", "first", "train", *CHANGE)
    checkpoints = kill_in_training(project_copy, run_all)
    wait_until_no_worker_runs(project_copy)
    run(project_copy, *queue, "-n", "again", "train", *CHANGE)
    run(project_copy, *queue, "-S", "train.lr=1e-4")
    run(project_copy, *run_all, "-j", "2")
    assert (checkpoints / "finished.json").exists()
    runs = finished_runs(project_copy)
    assert len(runs) == 3  # the run of `reproduced`, the resumed one, and that with another learning rate
    shown = run(project_copy, "dvc", "exp", "show", "--json").stdout
    # Stage evaluate writes what DVC compares; only stage train of the resumed experiment ran.
    assert sum(f'"{each[:8]}"' in shown for each in runs) == 2
    dropped = ".*/|Created|Executor|tokens"  # as in docs/experiments.md
    table = run(project_copy, "dvc", "exp", "show", "--only-changed", "--drop", dropped).stdout
    assert max(len(line) for line in table.splitlines()) <= 160
    assert "train.lr" in table
    run(project_copy, "dvc", "exp", "apply", "again")
    assert of_stages_up_to_train(digests(project_copy)) == of_stages_up_to_train(in_place.digests)


def go_to_the_commit(project: Path) -> None:
    run(project, "git", "checkout", "-q", "--", ".")
    run(project, "dvc", "checkout")


def check_only_train_and_evaluate_ran(output: str) -> None:
    for stage in ("collect", "tokenize", "split"):
        assert f"Running stage '{stage}'" not in output
    for stage in ("train", "evaluate"):
        assert f"Running stage '{stage}'" in output


def check_restore(project: Path, of_run: str, outputs: dict[str, str]) -> None:
    """The command in a run's description restores code, parameters, data and model, whatever has changed."""
    tags = tags_of_run(project, of_run)
    assert tags["changed"] == "train.max_steps=60"
    assert tags["sweep"].endswith(": train.max_steps")
    arguments = tags["mlflow.note.content"].split("    gptpipe restore ")[1].split()
    run(project, "git", "stash", "-q")
    run(project, "dvc", "checkout")
    arguments[0] = arguments[0][:8]  # as in `dvc exp show`
    run(project, sys.executable, "-m", "gptpipe.commands.cli", "restore", *arguments)

    restored = project.with_name(f"{project.name}-{arguments[0][:8]}")
    assert (restored / EDITED_FILE).read_text().endswith(EDIT)
    assert of_stages_up_to_train(digests(restored)) == of_stages_up_to_train(outputs)
    assert "Running stage 'train'" not in run(restored, "dvc", "repro").stdout
    assert digests(restored) == outputs


def of_stages_up_to_train(outputs: dict[str, str]) -> dict[str, str]:
    """Digests without those of stage evaluate, which `gptpipe restore` leaves to `dvc repro`."""
    of_evaluate = ("reports/eval", "reports/samples")
    others = {name: digest for name, digest in outputs.items() if not name.startswith(of_evaluate)}
    assert len(others) > 15
    return others


def tags_of_run(project: Path, of_run: str) -> dict[str, str]:
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        return dict(database.execute("select key, value from tags where run_uuid = ?", (of_run,)).fetchall())


def kill_in_training(project: Path, command: list[str]) -> Path:
    """Run an experiment; kill its stage train after the first checkpoint. Returns the folder of checkpoints."""
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
    assert not (folder / "finished.json").exists()
    return folder


def wait_until_no_worker_runs(project: Path) -> None:
    """`--run-all` waits forever if it starts while a worker of the queue is about to end."""
    statuses = (run(project, "dvc", "queue", "status").stdout for _ in range(60))
    assert any("0 active, 0 idle" in status for status in statuses)

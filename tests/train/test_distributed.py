"""Training by two and three real processes over gloo: the same as by one, even if one is stopped or killed."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from toy_project import Project, start_ranks

from gptpipe.base.manifest import verify
from gptpipe.model.hf_weights import load_model
from gptpipe.params import Params
from gptpipe.shell.errors import ConfigError, Interrupted, ResourceError
from gptpipe.train import distributed

pytestmark = pytest.mark.slow

CHANGES = {"train__micro_batch_size": 1, "model__tie_embeddings": False}  # two micro-batches per rank


@pytest.fixture(scope="module", params=["adamw", "muon"])
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_split: Path
) -> tuple[str, Project]:
    """The name of the optimizer, and the project of a training by one process."""
    made = Project(tmp_path_factory.mktemp("alone"), toy_split)
    made.train(tiny.params(train__optimizer=request.param, **CHANGES))
    return request.param, made


def exit_codes(ranks: list[BaseProcess]) -> list[int | None]:
    for rank in ranks:
        rank.join(120)
    return [rank.exitcode for rank in ranks]


def output_of(project: Project, rank: int) -> str:
    return (project.root / f"rank-{rank}.err").read_text()


def assert_alike(actual: Project, expected: Project) -> None:
    """Compare losses, gradient norms and weights, to 1 part in 100,000 (weights: 1 in 1,000) and 1e-5."""
    for name in ("steps", "validations"):
        tables = [pd.read_csv(project.root / f"reports/train.{name}.csv") for project in (actual, expected)]
        pd.testing.assert_frame_equal(*tables, check_exact=False, rtol=1e-5)
    models = [
        dict(load_model(project.root / "models/gpt").named_parameters()) for project in (actual, expected)
    ]
    for name, weight in models[1].items():
        torch.testing.assert_close(models[0][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_follow_the_curve_of_one(project: Project, alone: tuple[str, Project], parallel: str) -> None:
    optimizer, expected = alone
    params = tiny.params(train__optimizer=optimizer, train__parallel=parallel, **CHANGES)
    assert exit_codes(start_ranks(2, params, project)) == [0, 0]
    assert_alike(project, expected)
    assert f"processes: 2 by {parallel}" in output_of(project, 0)
    assert output_of(project, 1) == ""
    assert project.checkpoints()[-1] == "step-00000012"  # kept until evaluate is done


def test_if_one_rank_runs_out_of_memory_all_ranks_halve_their_micro_batches(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A rerun continues bit for bit with the same memory, and fails with less."""
    params = tiny.params(train__batch_size=12, train__save_every=2)
    undisturbed = Project(tmp_path_factory.mktemp("undisturbed"), project.split)
    assert exit_codes(start_ranks(2, params, undisturbed, TOY_SEQUENCES="2")) == [0, 0]
    assert exit_codes(start_ranks(2, params, project, stop_at=4, TOY_SEQUENCES="2")) == [143, 143]
    assert [line for line in output_of(project, 0).splitlines() if "memory" in line] == [
        "warning: out of memory; continuing with micro-batches of 3",
        "warning: out of memory; continuing with micro-batches of 1",
    ]
    assert saved_micro_batch_size(project, step=4) == 1
    assert exit_codes(start_ranks(2, params, project, TOY_SEQUENCES="0")) == [5, 5]
    assert exit_codes(start_ranks(2, params, project, TOY_SEQUENCES="2")) == [0, 0]
    alone = Project(tmp_path_factory.mktemp("alone"), project.split)
    alone.train(params)
    assert_alike(project, alone)
    assert project.digests() == undisturbed.digests()


def test_if_a_single_sequence_does_not_fit_on_one_rank_all_ranks_stop(project: Project) -> None:
    assert exit_codes(start_ranks(2, tiny.params(), project, TOY_SEQUENCES="0")) == [5, 5]
    errors = [line for rank in range(2) for line in output_of(project, rank).splitlines() if "error" in line]
    assert len(errors) == 1
    assert "error: train: out of memory with single sequences; lower the model's size" in errors[0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_roll_back_like_one(
    project: Project, tmp_path_factory: pytest.TempPathFactory, parallel: str
) -> None:
    changes = {"on_spike": "rollback", "spike_sigmas": 0.02, "max_steps": 30, "save_every": 5}
    params = tiny.params(
        train__parallel=parallel, **{f"train__{name}": value for name, value in changes.items()}
    )
    assert exit_codes(start_ranks(2, params, project)) == [0, 0]
    rolled_back = [line for line in output_of(project, 0).splitlines() if "continuing from step" in line]
    assert rolled_back
    alone = Project(tmp_path_factory.mktemp("alone"), project.split)
    alone.train(params)
    tagged = [name for name in alone.records[-1].tagged if name.startswith("rolled_back")]
    assert len(tagged) == len(rolled_back)
    assert_alike(project, alone)


def test_a_roll_back_keeps_the_micro_batch_size_of_these_ranks(project: Project) -> None:
    """One process saves step 20 with micro-batches of 4 sequences. Two ranks resume with 2 sequences each, then
    go back to step 20, because step 21 is the first with enough steps before it to count as a spike.
    """
    changes = {"on_spike": "rollback", "spike_sigmas": 0.5, "max_steps": 26, "save_every": 10, "eval_every": 26}
    steady = {"lr": 3e-4, "schedule": "constant"}  # the loss falls so slowly that step 21 stands out
    params = tiny.params(**{f"train__{name}": value for name, value in {**changes, **steady}.items()})
    with pytest.raises(Interrupted):
        project.train(params, stop_at=20)
    assert saved_micro_batch_size(project, step=20) == 4
    assert exit_codes(start_ranks(2, params, project, GPTPIPE_ALLOW_INEXACT="1")) == [0, 0]
    assert "continuing from step 20" in output_of(project, 0)
    assert saved_micro_batch_size(project, step=26) == 2


def saved_micro_batch_size(project: Project, step: int) -> int:
    (saved,) = project.root.glob(f".gptpipe/checkpoints/*/step-{step:08d}/state.json")
    size: int = json.loads(saved.read_bytes())["micro_batch_size"]
    return size


@pytest.mark.parametrize(("parallel", "n", "optimizer"), [("ddp", 3, "muon"), ("fsdp", 2, "adamw")])
def test_a_signal_to_one_rank_stops_all_and_a_rerun_continues_bit_for_bit(
    project: Project, tmp_path: Path, parallel: str, n: int, optimizer: str
) -> None:
    """With three ranks too, whose sums depend on the order of the summands."""
    params = tiny.params(
        train__parallel=parallel, train__batch_size=6, train__optimizer=optimizer, model__dropout=0.1
    )
    assert exit_codes(start_ranks(n, params, project)) == [0] * n
    undisturbed = project.digests()
    project = Project(tmp_path / "again", project.split)
    project.root.mkdir()
    assert exit_codes(start_ranks(n, params, project, stop_at=4)) == [143] * n
    assert project.checkpoints()[-1] == "step-00000004"
    output = "".join(output_of(project, rank) for rank in range(n))
    assert [line for line in output.splitlines() if "error" in line] == [
        "error: SIGTERM: train: stopped after saving; rerun to continue from there"
    ]
    assert exit_codes(start_ranks(n, params, project)) == [0] * n
    assert "resumed after step 4" in output_of(project, 0)
    assert project.digests() == undisturbed


def test_another_number_of_ranks_can_resume_if_allowed(
    project: Project, alone: tuple[str, Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From two to one with AdamW, from one to two with Muon."""
    optimizer, expected = alone
    params = tiny.params(train__optimizer=optimizer, train__parallel="fsdp", **CHANGES)
    if optimizer == "adamw":
        assert exit_codes(start_ranks(2, params, project, stop_at=4)) == [143, 143]
        with pytest.raises(ResourceError, match="ranks was 2 by fsdp, is 1"):
            project.train(params)
        monkeypatch.setenv("GPTPIPE_ALLOW_INEXACT", "1")
        project.train(params)
    else:
        with pytest.raises(Interrupted):
            project.train(params, stop_at=4)
        assert exit_codes(start_ranks(2, params, project)) == [5, 5]
        errors = [
            line for rank in range(2) for line in output_of(project, rank).splitlines() if "error" in line
        ]
        assert len(errors) == 1
        assert "ranks was 1, is 2 by fsdp" in errors[0]
        assert exit_codes(start_ranks(2, params, project, GPTPIPE_ALLOW_INEXACT="1")) == [0, 0]
    assert_alike(project, expected)


@pytest.mark.parametrize("victim", [0, 1])
def test_if_a_rank_is_killed_the_others_stop_with_one_line_and_a_sound_checkpoint(
    project: Project, victim: int
) -> None:
    params = tiny.params(train__max_steps=100_000, train__eval_every=100_000, train__save_every=5)
    ranks = start_ranks(2, params, project)
    while not any(name.startswith("step-") for name in project.checkpoints()) and ranks[0].exitcode is None:
        time.sleep(0.01)
    os.kill(ranks[victim].pid or 0, signal.SIGKILL)
    survivor = 1 - victim
    assert exit_codes(ranks)[survivor] == 5
    errors = [line for line in output_of(project, survivor).splitlines() if "error" in line]
    assert errors == [
        f"error: train: rank {survivor} lost another rank; rerun to continue from the last checkpoint"
    ]
    verify(max(project.root.glob(".gptpipe/checkpoints/*/step-*")))


ELASTIC_RANK = """
import os, signal, sys, threading, time
sys.path[:0] = [{tests!r}, {root!r}]
import tiny
from toy_project import Path, train_and_exit

project = Path({project!r})

def end_at_the_first_checkpoint():
    while not list(project.glob(".gptpipe/checkpoints/*/step-*/manifest.json")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    threading.Thread(target=end_at_the_first_checkpoint, daemon=True).start()
train_and_exit(tiny.params(**{changes!r}), Path({split!r}), project, None, {{}})
"""


def test_a_run_that_torchrun_restarts_after_a_kill_ends_like_an_undisturbed_one(
    project: Project, tmp_path: Path
) -> None:
    changes = {
        "train__max_steps": 150,
        "train__save_every": 5,
        "train__eval_every": 50,
        "train__warmup_steps": 2,
    }
    undisturbed = Project(tmp_path / "undisturbed", project.split)
    undisturbed.root.mkdir()
    assert exit_codes(start_ranks(2, tiny.params(**changes), undisturbed)) == [0, 0]
    script, tests = tmp_path / "rank.py", Path(__file__).parents[1]
    names = {
        "tests": str(tests),
        "root": str(tests.parent),
        "project": str(project.root),
        "split": str(project.split),
    }
    script.write_text(ELASTIC_RANK.format(**names, changes=changes))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
    ]
    result = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "resumed after step" in output_of(project, 0)
    assert project.digests() == undisturbed.digests()


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, n_ranks: int) -> None:
    values = {"TORCHELASTIC_RUN_ID": "test", "RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": rank}
    for name, value in {**values, "LOCAL_WORLD_SIZE": n_ranks}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 6])
def test_the_parts_of_any_number_of_ranks_make_the_batch_of_one(
    n_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, batches, plan = tiny.trained_state(train__batch_size=6)
    for step in range(20):
        parts = []
        for rank in range(n_ranks):
            as_rank(monkeypatch, rank, n_ranks)
            parts.append(batches.at(step, distributed.batch_slice(plan.params)))
        for tensors, expected in zip(zip(*parts, strict=True), batches.at(step), strict=True):
            assert torch.equal(torch.cat(tensors), expected)


@pytest.mark.parametrize(("n_ranks", "micro_batch_size"), [(3, None), (2, 4)])
def test_a_batch_that_ranks_cannot_share_equally_is_an_error(
    n_ranks: int, micro_batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 0, n_ranks)
    params: Params = tiny.params(train__micro_batch_size=micro_batch_size)
    with pytest.raises(
        ConfigError, match=rf"train\.batch_size 4 must be a multiple of {n_ranks} processes"
    ) as caught:
        distributed.batch_slice(params.train)
    assert caught.value.exit_code == 2

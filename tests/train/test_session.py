"""The whole of stage train on a toy split: what it writes, and that an interruption changes none of it."""

import json
import math
import os
import shutil
import signal
import time
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from sections import split_params
from toy_project import ListRecord, Project, fail_at_batch, start, wait_for_the_lock

from gptpipe.base.files import sha256_of
from gptpipe.base.manifest import verify
from gptpipe.base.pages import as_text
from gptpipe.formats.hf_tokenizer import check_same_tokens
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import load_model
from gptpipe.params import Params
from gptpipe.score.metrics import Metrics, compute_metrics
from gptpipe.shell.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    Interrupted,
    NumericError,
    ResourceError,
)
from gptpipe.split.split import split
from gptpipe.tokenize.tokenizers import train_tokenizer
from gptpipe.train import session
from gptpipe.train.checkpoint import Checkpoints
from gptpipe.train.runtime import Runtime
from gptpipe.train.state import TrainState, Validation


@pytest.fixture(scope="module", params=["adamw", "muon"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_split: Path
) -> tuple[Params, dict[str, str]]:
    """Parameters, and the digests of the results of a training that is not interrupted."""
    params = tiny.params(train__optimizer=request.param, model__dropout=0.1)
    project = Project(tmp_path_factory.mktemp("undisturbed"), toy_split)
    project.train(params)
    return params, project.digests()


def test_the_files_that_a_training_writes(project: Project) -> None:
    best = project.train(tiny.params())
    model, lineage = verify(project.root / "models/gpt"), verify(project.split)
    assert model.made_from == {**lineage.made_from, "split": lineage.digest}
    reports = model.counts.pop("reports")
    assert reports == {name: sha256_of(project.root / "reports" / name) for name in reports}
    assert len(reports) == 4
    assert model.counts.pop("scoring") == {"precision": "float32", "document_masking": False}
    assert model.counts == {"best_step": 12, "steps": 12, "tokens": 12 * 4 * 16, "parameters": 25152}
    assert sorted(model.files) == [
        "README.md",
        "config.json",
        "encoding.json",
        "generation_config.json",
        "model.safetensors",
        "ranks.tiktoken",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    summary = json.loads((project.root / "reports/train.json").read_bytes())
    assert summary["val"] == best
    assert best["loss"] < 5.2 < 5.6  # 300 tokens at even odds: 5.7
    steps = pd.read_csv(project.root / "reports/train.steps.csv")
    assert list(steps.columns) == ["step", "loss", "grad_norm", "lr"]
    assert steps["step"].tolist() == list(range(1, 13))
    validations = pd.read_csv(project.root / "reports/train.validations.csv")
    assert validations["step"].tolist() == [0, 4, 8, 12]
    assert validations["train_loss"].isna().tolist() == [True, False, False, False]
    assert validations["train_loss"][1] == pytest.approx(steps["loss"][:4].mean())
    assert validations["val_loss"].min() == pytest.approx(best["loss"])
    (record,) = project.records
    run = json.loads((project.root / "reports/mlflow_run.json").read_bytes())
    assert run["run_id"] == record.run_id
    # 4 sequences of 16 tokens in each step
    seconds = [
        64 / metrics["train/tokens_per_second"] for _, _, metrics in record.entries if "train/loss" in metrics
    ]
    assert len(seconds) == 12
    assert run["seconds"] == pytest.approx(sum(seconds))
    card = (project.root / "models/gpt/README.md").read_text()
    assert "trained from scratch" in card
    assert lineage.digest in card
    # They stay until stage evaluate is done.
    assert project.checkpoints() == ["best-00000008", "best-00000012", "step-00000009", "step-00000012"]


def test_the_metrics_texts_and_tags_that_a_training_records(project: Project) -> None:
    project.train(tiny.params())
    (record,) = project.records
    assert [step for step, _, metrics in record.entries if "train/loss" in metrics] == list(range(1, 13))
    assert [step for step, _, metrics in record.entries if "val/loss" in metrics] == [0, 4, 8, 12]
    table = json.loads(record.texts["samples.json"])
    assert table["columns"] == ["step", "prompt", "continuation"]
    assert [row[:2] for row in table["data"]] == [[step, "the "] for step in (0, 4, 8, 12)]
    assert table == json.loads((project.root / "reports/train.samples.json").read_bytes())
    assert record.tagged["best_step"] == "12"
    assert record.environment["micro_batch_size"] == 4


def test_the_model_written_is_the_best_not_the_last(project: Project) -> None:
    """With a far too high learning rate, the model before the first step is the best."""
    params = tiny.params(train__lr=3.0, train__schedule="constant", train__grad_clip=None)
    best = project.train(params)
    summary = json.loads((project.root / "reports/train.json").read_bytes())
    assert summary["best_step"] == 0
    assert {"exploding", "lr_too_high", "untrained"} <= set(summary["red_flags"])
    assert project.records[0].tagged["red_flag.untrained"] == summary["red_flags"]["untrained"]
    card = unescape((project.root / "models/gpt/README.md").read_text())
    assert "This model is untrained" in card
    assert summary["red_flags"]["untrained"] in card
    validations = pd.read_csv(project.root / "reports/train.validations.csv")
    assert best["loss"] == pytest.approx(validations["val_loss"][0])
    model = load_model(project.root / "models/gpt")
    torch.manual_seed(params.seed)
    fresh = GPT(params.model, 300)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name))


@pytest.mark.parametrize("stop_at", [0, 3, 5, 8, 9])
def test_an_interrupted_training_ends_like_an_undisturbed_one(
    project: Project, undisturbed: tuple[Params, dict[str, str]], stop_at: int
) -> None:
    params, digests = undisturbed
    with pytest.raises(Interrupted) as caught:
        project.train(params, stop_at=stop_at)
    assert caught.value.exit_code == 143
    assert not (project.root / "models").exists()
    assert project.checkpoints()[-1] == f"step-{stop_at:08d}"
    project.train(params)
    assert project.digests() == digests
    first, second = project.records
    assert second.run_id == first.run_id
    assert [step for step, _, metrics in second.entries if "train/loss" in metrics] == list(range(1, 13))
    sent = {(step, key): (time_ms, value) for step, time_ms, m in first.entries for key, value in m.items()}
    again = {(step, key): (time_ms, value) for step, time_ms, m in second.entries for key, value in m.items()}
    assert sent.items() <= again.items()  # replayed with the same times


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_no_trace(
    toy_split: Path, undisturbed: tuple[Params, dict[str, str]], tmp_path: Path
) -> None:
    """Also during recovery: the moments are spread over training, saving and writing the results.

    Trains until there were 15 kills with each optimizer; GPTPIPE_TEST_KILLS=1000 takes a night.
    """
    params, digests = undisturbed
    wanted, seed = int(os.environ.get("GPTPIPE_TEST_KILLS", "15")), time.time_ns()
    rng = np.random.default_rng(seed)
    n_killed = 0
    while n_killed < wanted:
        project = Project(tmp_path / str(n_killed), toy_split)
        process = start(params, project)
        while n_killed < wanted and wait_for_the_lock(project, process):
            process.join(float(rng.uniform(0, 0.4)))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            n_killed += 1
            process = start(params, project)
        process.join(60)
        assert process.exitcode == 0, f"seed {seed}, after {n_killed} kills"
        assert project.digests() == digests, f"seed {seed}, after {n_killed} kills"
        verify(project.root / "models/gpt")
        assert project.checkpoints()[-1] == "step-00000012"
        assert not list(project.root.rglob("*.partial"))


def test_a_wrong_clock_that_jumps_back_changes_nothing(
    project: Project, undisturbed: tuple[Params, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, digests = undisturbed
    now = iter(range(10**18, 0, -86_400 * 10**9))  # from 2001 on, a day earlier at each call
    monkeypatch.setattr("gptpipe.train.session.time.time_ns", lambda: next(now))
    with pytest.raises(Interrupted):
        project.train(params, stop_at=6)
    project.train(params)
    assert project.digests() == digests
    times = {(step, key): time_ms for step, time_ms, metrics in project.records[0].entries for key in metrics}
    again = {(step, key): time_ms for step, time_ms, metrics in project.records[1].entries for key in metrics}
    assert times.items() <= again.items()


@pytest.mark.slow
def test_a_signal_ends_a_training_within_seconds_with_its_state_saved(project: Project) -> None:
    params = tiny.params(train__max_steps=100_000, train__save_every=100_000, train__eval_every=100_000)
    process = start(params, project)
    assert wait_for_the_lock(project, process)
    process.join(0.5)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
    assert [name for name in project.checkpoints() if name.startswith("step-")]


@pytest.mark.slow
def test_a_second_training_of_the_same_run_is_refused(project: Project) -> None:
    params = tiny.params(train__max_steps=100_000, train__eval_every=100_000)
    process = start(params, project)
    assert wait_for_the_lock(project, process)
    try:
        with pytest.raises(ResourceError, match=f"process {process.pid} on .* is writing it"):
            project.train(params)
    finally:
        process.kill()
        process.join()


def test_a_finished_training_is_not_repeated(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """DVC is killed before it records the stage: it removes the outputs, and runs the stage again."""
    project.train(tiny.params())
    made, saved = project.digests(), project.checkpoints()
    shutil.rmtree(project.root / "models")
    shutil.rmtree(project.root / "reports")
    capsys.readouterr()
    project.train(tiny.params())
    assert project.digests() == made
    assert project.checkpoints() == saved
    assert "already finished, after step 12; writing its results again" in capsys.readouterr().err
    first, second = project.records
    assert second.run_id == first.run_id
    assert second.entries == first.entries  # with the same times: no step was repeated


def test_a_training_finished_by_other_code_is_repeated(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.train(tiny.params())
    describe = Runtime.describe
    monkeypatch.setattr(Runtime, "describe", lambda self: {**describe(self), "training_code": "other"})
    project.train(tiny.params())
    first, second = project.records
    assert second.run_id != first.run_id


def test_a_kill_before_the_first_checkpoint_leaves_one_run(project: Project) -> None:
    params = tiny.params(train__max_steps=100_000, train__save_every=100_000, train__eval_every=100_000)
    process = start(params, project)
    deadline = time.monotonic() + 60
    while not (names := list(project.root.glob(".gptpipe/checkpoints/*/run.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = names[0].read_bytes()
    process.kill()
    process.join()
    assert not [name for name in project.checkpoints() if name.startswith("step-")]
    with pytest.raises(Interrupted):
        project.train(params, stop_at=0)
    assert names[0].read_bytes() == before
    assert project.records[0].run_id == json.loads(before)["run_id"]


def test_a_resumed_training_keeps_its_micro_batches(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if there is less free memory now."""
    with pytest.raises(Interrupted):
        project.train(tiny.params(), stop_at=4)
    monkeypatch.setattr("gptpipe.train.session.free_bytes", lambda _: 0)
    project.train(tiny.params())
    assert project.records[1].environment["micro_batch_size"] == 4


def test_a_step_is_saved_once_even_if_the_training_stops_directly_after_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3, 6 and 9 are saved because of `save_every`. A stop before the next step adds no save, nor does a
    rerun that is stopped before its first step, nor one that only writes the results again.
    """
    save, train = Checkpoints.save, session.train
    saved_steps: list[int] = []

    def count(checkpoints: Checkpoints, state: TrainState) -> None:
        saved_steps.append(state.step)
        save(checkpoints, state)

    monkeypatch.setattr(Checkpoints, "save", count)
    with pytest.raises(Interrupted):
        project.train(tiny.params(), stop_at=9)
    assert saved_steps == [3, 6, 9]
    monkeypatch.setattr(session, "train", stop)
    with pytest.raises(Interrupted):
        project.train(tiny.params())
    assert saved_steps == [3, 6, 9]
    monkeypatch.setattr(session, "train", train)
    for _ in range(2):
        project.train(tiny.params())
        assert saved_steps == [3, 6, 9, 12]


def stop(*_: object) -> None:
    raise Interrupted(signal.SIGTERM, "stopped")


def test_a_red_flag_that_no_longer_holds_leaves_the_record(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if the training was interrupted in between. Otherwise the record would contain opposite advice."""

    def flags(history: list[Validation], n_steps: int) -> dict[str, str]:
        if len(history) == 2:
            return {"lr_too_low": "too low"}
        return {"exploding": "too high"} if len(history) > 2 else {}

    monkeypatch.setattr(session, "red_flags", flags)
    with pytest.raises(Interrupted):
        project.train(tiny.params(), stop_at=5)
    first = project.records[0].tagged
    assert {name: text for name, text in first.items() if "flag" in name} == {"red_flag.lr_too_low": "too low"}
    sent: list[dict[str, str]] = []
    monkeypatch.setattr(ListRecord, "tags", lambda _, tags: sent.append(tags))
    project.train(tiny.params())
    assert {"red_flag.lr_too_low": "", "red_flag.exploding": "too high"} in sent
    assert capsys.readouterr().err.count("red flag: too high") == 1


def test_a_sample_prompt_longer_than_the_context_is_announced_once(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.train(tiny.params(train__sample_prompts=("the ", "Zürich, " * 9)))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "only the last 16 are used" in line]
    assert warning.startswith("warning: train.sample_prompts[1] has ")


def test_patience_ends_a_training_early(project: Project) -> None:
    params = tiny.params(
        train__lr=3.0, train__schedule="constant", train__grad_clip=None, train__eval_every=1, train__patience=2
    )
    project.train(params)
    assert json.loads((project.root / "reports/train.json").read_bytes())["steps"] == 2
    assert "step-00000002" in project.checkpoints()  # so that a rerun only writes the results again


def test_a_numeric_error_leaves_the_last_good_checkpoint(project: Project) -> None:
    params = tiny.params(
        train__lr=1e38,
        train__schedule="constant",
        train__grad_clip=None,
        train__warmup_steps=6,
        train__eval_every=100,
        train__save_every=1,
    )
    with pytest.raises(NumericError) as caught:
        project.train(params)
    assert caught.value.exit_code == 6
    assert not (project.root / "models").exists()
    failed = int(str(caught.value).split()[2].rstrip(":"))
    steps = sorted((project.root / ".gptpipe/checkpoints").glob("*/step-*"))
    assert steps[-1].name == f"step-{failed - 1:08d}"
    verify(steps[-1])


@pytest.mark.parametrize("n_updates", [0, 2])
def test_out_of_memory_in_the_update_is_a_resource_error_that_names_the_last_step(
    project: Project, monkeypatch: pytest.MonkeyPatch, n_updates: int
) -> None:
    update, updates = torch.optim.AdamW.step, iter(range(n_updates))

    def step(*arguments: Any, **options: Any) -> None:
        if next(updates, None) is None:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 7 bytes"
            )
        update(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(ResourceError, match=f"train: out of memory after step {n_updates}; free memory"):
        project.train(tiny.params())


def test_an_inexact_resume_is_mentioned_in_the_model_card(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        project.train(tiny.params(), stop_at=5)
    describe = Runtime.describe
    monkeypatch.setattr(Runtime, "describe", lambda self: {**describe(self), "threads": 99})
    monkeypatch.setenv("GPTPIPE_ALLOW_INEXACT", "1")
    project.train(tiny.params())
    (difference,) = json.loads((project.root / "reports/train.json").read_bytes())["resumed_inexactly"]
    assert difference.endswith("is 99")
    assert difference in (project.root / "models/gpt/README.md").read_text()
    assert project.records[-1].tagged["resumed_inexactly"] == difference


def test_switches_reach_the_network_and_torch(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, bool]] = set()
    real = GPT.hidden

    def hidden(self: GPT, *rest: Any, **options: Any) -> torch.Tensor:
        seen.add((self.activation_checkpointing, torch.are_deterministic_algorithms_enabled()))
        return real(self, *rest, **options)

    monkeypatch.setattr(GPT, "hidden", hidden)
    torch.use_deterministic_algorithms(False)
    project.train(tiny.params(train__activation_checkpointing=True))
    assert seen == {(True, True)}


def test_a_spike_is_rolled_back_and_recorded_and_a_resumed_run_ends_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch makes the loss infinite at any step. It is skipped."""
    fail_at_batch(monkeypatch, project, 4)
    with pytest.raises(NumericError, match="step 5"):
        project.train(tiny.params())
    shutil.rmtree(project.root / ".gptpipe")
    params = tiny.params(train__on_spike="rollback")
    project.train(params)
    undisturbed_digests, record = project.digests(), project.records[-1]
    assert [step for step, _, m in record.entries if "train/loss" in m] == list(range(1, 13))
    assert [tag for tag in record.tagged if tag.startswith("rolled")] == ["rolled_back.00000005"]
    shutil.rmtree(project.root / "models")
    shutil.rmtree(project.root / ".gptpipe")
    with pytest.raises(Interrupted):
        project.train(params, stop_at=7)
    project.train(params)
    assert project.digests() == undisturbed_digests


def recorded_steps(record: ListRecord) -> list[int]:
    return [step for step, _, metrics in record.entries if "train/loss" in metrics]


@pytest.mark.parametrize(
    "error", [None, ResourceError("no memory"), RuntimeError("a bug"), KeyboardInterrupt()]
)
@pytest.mark.parametrize(("on_spike", "n_recorded"), [("stop", 7), ("rollback", 6)])
def test_the_record_of_a_training_that_fails_has_its_last_points(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    on_spike: str,
    n_recorded: int,
) -> None:
    """The batch of step 8 fails; the last save was at 6. After a roll-back, other values would follow it."""
    fail_at_batch(monkeypatch, project, 7, error)
    if error is None and on_spike == "rollback":
        monkeypatch.setattr(session, "_MAX_ROLL_BACKS", 0)
    with pytest.raises(type(error) if error else NumericError):
        project.train(tiny.params(train__on_spike=on_spike, train__eval_every=100))
    assert recorded_steps(project.records[0]) == list(range(1, n_recorded + 1))


def test_a_validation_loss_that_is_not_finite_is_not_recorded(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The points before it are."""

    def metrics_of(*arguments: Any) -> Metrics:
        metrics = compute_metrics(*arguments)
        return metrics if project.records[0].entries == [] else {**metrics, "loss": math.nan}

    monkeypatch.setattr(session, "compute_metrics", metrics_of)
    with pytest.raises(NumericError, match="validation loss is nan after step 4"):
        project.train(tiny.params(train__save_every=100))
    record = project.records[0]
    assert recorded_steps(record) == [1, 2, 3, 4]
    assert [step for step, _, metrics in record.entries if "val/loss" in metrics] == [0]


@pytest.mark.parametrize("save_every", [3, 100])
def test_a_training_that_a_spike_has_stopped_can_continue_with_roll_backs(
    project: Project, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    """It ends like a training with roll-backs from the start. The record of the stopped one is left alone."""
    changes = {"train__save_every": save_every, "train__eval_every": 5}
    rollback = tiny.params(train__on_spike="rollback", **changes)
    fail_at_batch(monkeypatch, project, 7)
    project.train(rollback)
    expected = project.digests()
    for folder in ("models", ".gptpipe"):
        shutil.rmtree(project.root / folder)

    with pytest.raises(NumericError, match=r"step 8: .*train\.on_spike: rollback it continues"):
        project.train(tiny.params(**changes))
    with pytest.raises(Interrupted):
        project.train(rollback, stop_at=0)  # once the first points are sent
    project.train(rollback)
    digests = project.digests()
    differing = {name for name in expected if digests[name] != expected[name]}
    # If a checkpoint is from before the change, the report names the change, and the manifest the report.
    assert differing == ({"reports/train.json", "models/gpt/manifest.json"} if save_every == 3 else set())
    _, stopped, interrupted, finished = project.records
    assert recorded_steps(stopped) == list(range(1, 8))
    assert stopped.run_id != interrupted.run_id == finished.run_id
    assert interrupted.tagged["continues_run"] == finished.tagged["continues_run"] == stopped.run_id
    assert recorded_steps(finished) == list(range(1, 13))
    losses = {step: metrics["train/loss"] for step, _, metrics in finished.entries if "train/loss" in metrics}
    curve = pd.read_csv(project.root / "reports/train.steps.csv")
    assert list(losses.values()) == pytest.approx(curve["loss"].tolist())


def test_other_changes_of_on_spike_keep_the_run(project: Project) -> None:
    """What was recorded with roll-backs was saved before. A finished training is not recorded twice."""
    with pytest.raises(Interrupted):
        project.train(tiny.params(train__on_spike="rollback"), stop_at=6)
    for on_spike in ("stop", "rollback"):
        project.train(tiny.params(train__on_spike=on_spike))
    assert len({record.run_id for record in project.records}) == 1
    assert not any("continues_run" in record.tagged for record in project.records)


def test_a_loss_that_always_fails_is_not_rolled_back_forever(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT, "loss", lambda self, x, y, **_: self.hidden(x).sum() * math.nan)
    with pytest.raises(NumericError, match="step 1"):
        project.train(tiny.params(train__on_spike="rollback"))


def start_from(project: Project) -> str:
    project.train(tiny.params())
    (project.root / "models/gpt").rename(project.root / "first")
    return str(project.root / "first")


def test_a_training_can_start_from_a_model(project: Project) -> None:
    folder = start_from(project)
    before = json.loads((project.root / "reports/train.json").read_bytes())["val"]["loss"]
    project.train(tiny.params(train__init_from=folder, train__max_steps=4))
    validations = pd.read_csv(project.root / "reports/train.validations.csv")
    assert validations["val_loss"][0] == pytest.approx(before, rel=1e-5)
    assert (
        f"trained from the weights in {as_text(folder)}" in (project.root / "models/gpt/README.md").read_text()
    )


def test_a_training_does_not_start_from_a_model_for_other_tokens(project: Project, tmp_path: Path) -> None:
    """A vocabulary of the same size with two tokens exchanged."""
    folder = Path(start_from(project))
    (folder / "manifest.json").unlink()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["vocab"] |= {"a": content["model"]["vocab"]["b"], "b": content["model"]["vocab"]["a"]}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="its tokens are not those of this split"):
        project.train(tiny.params(train__init_from=str(folder)))
    path.write_text("[]")
    with pytest.raises(InputError, match="not a tokenizer"):
        project.train(tiny.params(train__init_from=str(folder)))


def test_a_warmup_longer_than_the_training_is_a_config_error(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"train\.warmup_steps 100 must be below the 36 steps"):
        project.train(tiny.params(train__epochs=1.0, train__max_steps=None, train__warmup_steps=100))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles")
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_training_that_is_stopped_ends_like_an_undisturbed_one(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    params = tiny.params(train__compile=True, train__z_loss=1e-3, train__document_masking=True)
    project.train(params)
    assert project.records[-1].environment["compiled"] is True
    stopped = Project(tmp_path_factory.mktemp("stopped"), project.split)
    with pytest.raises(Interrupted):
        stopped.train(params, stop_at=5)
    stopped.train(params)
    assert stopped.digests() == project.digests()


@pytest.mark.parametrize("size", [None, 4])
def test_a_batch_that_cannot_fit_is_an_error_before_the_first_step(
    project: Project, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    monkeypatch.setattr("gptpipe.train.session.free_bytes", lambda _: 1 << 16)
    with pytest.raises(
        ResourceError, match=f"micro-batches of {size or 1} need about 0.0 GiB, 0.0 are free"
    ) as caught:
        project.train(tiny.params(train__micro_batch_size=size))
    assert caught.value.exit_code == 5
    assert project.records == project.checkpoints() == []


def test_too_little_text_is_an_input_error(project: Project) -> None:
    with pytest.raises(InputError, match=r"the train split has \d+ tokens, one window needs 10001"):
        project.train(tiny.params(model__context_length=10_000))
    params = split_params(val_fraction=0.0, test_fraction=0.2)
    split(project.split.parent / "tokens", project.root / "split", params, 7)
    project.split = project.root / "split"
    with pytest.raises(
        InputError, match=r"validation split is empty; raise split\.val_fraction or add documents"
    ):
        project.train(tiny.params())
    assert project.records == []


def test_a_damaged_split_is_never_trained_on(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.split, tmp_path / "split")
    project.split = tmp_path / "split"
    path = project.split / "train/tokens.npy"
    content = bytearray(path.read_bytes())
    content[500] ^= 4
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        project.train(tiny.params())
    assert project.records == []


def test_the_model_folder_contains_the_tokenizer(project: Project) -> None:
    project.train(tiny.params())
    ours, theirs = Tokenizer.load(project.split / "tokenizer"), Tokenizer.load(project.root / "models/gpt")
    assert theirs.encode("the naïve café") == ours.encode("the naïve café")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"model": []}',
        b'{"model": {"vocab": []}}',
        b'{"model": {"vocab": [["a", 1]]}}',
        b"[" * 9999,
    ],
)
def test_an_invalid_tokenizer_of_init_from_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, 257)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer") as caught:
        check_same_tokens(tokenizer, tmp_path)
    assert "\n" not in str(caught.value)

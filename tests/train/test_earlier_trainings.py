"""Continuing and extending trainings after a change of settings, and which trainings are abandoned."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
from toy_project import Project, fail_at_batch

from gptpipe.base.files import seal
from gptpipe.base.finished_training import discard
from gptpipe.base.manifest import read_manifest, verify
from gptpipe.base.pages import as_text
from gptpipe.shell.errors import ConfigError, Interrupted, NumericError, ResourceError
from gptpipe.shell.locks import one_writer
from gptpipe.train.checkpoint import Checkpoints
from gptpipe.train.earlier_trainings import abandoned_trainings
from gptpipe.train.runtime import Runtime
from gptpipe.train.settings import settings_of

MODEL = "models/gpt/model.safetensors"


def stopped(project: Project, stop_at: int = 6, **changes: Any) -> Path:
    """Train, stop after a step, and return the checkpoint folder."""
    before = trainings(project)
    with pytest.raises(Interrupted):
        project.train(tiny.params(**changes), stop_at=stop_at)
    return (trainings(project) - before).pop()


def trainings(project: Project) -> set[Path]:
    return set((project.root / ".gptpipe/checkpoints").glob("[!.]*/"))


def summary(project: Project) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project.root / "reports/train.json").read_bytes())
    return content


def first_step(project: Project) -> int:
    """The first step that the newest training has done itself: the journal keeps the times of the others."""
    times = [
        {step: time for step, time, m in record.entries if "train/loss" in m} for record in project.records[-2:]
    ]
    return min(step for step, time in times[1].items() if times[0].get(step) != time)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, toy_split: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("undisturbed"), toy_split)
    project.train(tiny.params(model__dropout=0.1))
    return project


@pytest.mark.parametrize(
    "change",
    [
        {"train__save_every": 5},
        {"train__patience": 9},
        {"train__sample_prompts": ("a",)},
        {"train__on_spike": "rollback"},
        {"train__compile": "auto", "train__device": "auto", "train__precision": "auto"},
        {"train__micro_batch_size": 4},
        {"train__activation_checkpointing": True},
    ],
)
def test_after_a_harmless_change_a_training_continues_bit_for_bit(
    project: Project, undisturbed: Project, change: dict[str, Any]
) -> None:
    stopped(project, model__dropout=0.1)
    project.train(tiny.params(model__dropout=0.1, **change))
    assert first_step(project) == 7
    assert project.digests()[MODEL] == undisturbed.digests()[MODEL]
    assert project.digests()["reports/train.steps.csv"] == undisturbed.digests()["reports/train.steps.csv"]
    is_new_run = "train__on_spike" in change  # roll-backs replace points that the stopped run has
    assert (project.records[0].run_id != project.records[1].run_id) == is_new_run
    names = [text.split()[3] for text in summary(project)["changed_settings"]]
    assert names == sorted(name.replace("__", ".") for name in change)
    assert len(trainings(project)) == 1  # moved, not copied


def test_the_record_and_the_card_say_what_changed_after_which_step(project: Project) -> None:
    stopped(project)
    with pytest.raises(Interrupted):
        project.train(tiny.params(train__eval_every=6), stop_at=9)
    project.train(tiny.params(train__eval_every=6, train__save_every=5))
    expected = ["after step 6: train.eval_every was 4, is 6", "after step 9: train.save_every was 3, is 5"]
    assert summary(project)["changed_settings"] == expected
    assert project.records[-1].tagged["changed_settings"] == "; ".join(expected)
    assert as_text(expected[0]) in (project.root / "models/gpt/README.md").read_text()
    validations = pd.read_csv(project.root / "reports/train.validations.csv")
    assert validations["step"].tolist() == [0, 4, 6, 12]


def test_a_training_with_unchanged_settings_has_no_note(project: Project) -> None:
    stopped(project)
    project.train(tiny.params())
    assert "changed_settings" not in summary(project)


def test_other_micro_batches_are_used_from_the_next_step_on(project: Project) -> None:
    stopped(project)
    project.train(tiny.params(train__micro_batch_size=2))
    assert project.records[-1].environment["micro_batch_size"] == 2
    assert summary(project)["changed_settings"] == ["after step 6: train.micro_batch_size was null, is 2"]


def test_more_steps_continue_a_stopped_training_if_the_schedule_allows(
    project: Project, toy_split: Path
) -> None:
    stopped(project, train__schedule="wsd", train__max_steps=10)  # it decays in the last 4 steps
    project.train(tiny.params(train__schedule="wsd", train__max_steps=16))
    longer = Project(project.root / "longer", toy_split)
    longer.train(tiny.params(train__schedule="wsd", train__max_steps=16))
    assert first_step(project) == 7
    for name in (MODEL, "reports/train.steps.csv", "reports/train.validations.csv"):
        assert project.digests()[name] == longer.digests()[name]


@pytest.mark.parametrize("change", [{"train__lr": 1e-4}, {"train__max_steps": 20}, {"train__batch_size": 2}])
def test_after_a_harmful_change_a_training_starts_again_and_says_what_it_could_continue(
    project: Project, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    """The schedule is a cosine, which depends on the number of steps."""
    folder = stopped(project)
    capsys.readouterr()
    with pytest.raises(Interrupted):
        project.train(tiny.params(**change), stop_at=1)
    message = capsys.readouterr().err
    is_kept = f"starts at step 0; an unfinished training is kept, at step 6 of {folder}"
    assert is_kept in message.replace("\n", "")
    assert next(iter(change)).replace("__", ".") in message
    assert f"set train.continue_from to {folder.name}" in message
    assert first_step(project) == 1
    assert folder.exists()


def test_a_change_of_the_network_does_not_suggest_to_continue(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(project)
    with pytest.raises(Interrupted):
        project.train(tiny.params(model__n_layer=1), stop_at=1)
    assert "continue_from" not in capsys.readouterr().err


def test_another_environment_is_not_taken_over(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped(project)
    describe = Runtime.describe
    monkeypatch.setattr(Runtime, "describe", lambda self: {**describe(self), "compiled": True})
    with pytest.raises(Interrupted):
        project.train(tiny.params(train__compile="auto"), stop_at=1)
    assert first_step(project) == 1
    monkeypatch.setenv("GPTPIPE_ALLOW_INEXACT", "1")
    with pytest.raises(Interrupted):
        project.train(tiny.params(train__save_every=7), stop_at=7)
    assert not folder.exists()


def test_a_training_that_is_running_or_finished_is_not_taken_over(project: Project) -> None:
    folder = stopped(project)
    with one_writer(folder), pytest.raises(Interrupted):
        project.train(tiny.params(train__save_every=5), stop_at=1)
    assert folder.exists()
    project.train(tiny.params())
    project.train(tiny.params(train__save_every=2))
    assert project.records[-1].run_id != project.records[0].run_id


def test_a_declared_training_is_continued_with_the_new_settings(project: Project) -> None:
    folder = stopped(project)
    project.train(tiny.params(train__lr=1e-3, train__continue_from=folder.name))
    assert first_step(project) == 7
    earlier, later = project.records
    assert earlier.run_id != later.run_id
    run, *changes = summary(project)["changed_settings"]
    assert run == f"after step 6: continued from run {json.loads((folder / 'run.json').read_bytes())['run_id']}"
    assert "after step 6: train.lr was 0.003, is 0.001" in changes
    assert len(read_manifest(project.root / "models/gpt").made_from["continue_from"]) == 64
    rates = pd.read_csv(project.root / "reports/train.steps.csv")["lr"]
    assert rates[5] > 1.5e-3 > 1e-3 > rates[6]
    assert folder.exists()  # it can be continued in another way too


def test_a_declared_continuation_that_is_killed_no_longer_needs_its_origin(project: Project) -> None:
    folder = stopped(project)
    params = tiny.params(train__lr=1e-3, train__continue_from=folder.name, model__dropout=0.1)
    with pytest.raises(Interrupted):
        project.train(params, stop_at=8)
    folder.rename(project.root / "elsewhere")
    project.train(params)
    made = project.digests()[MODEL]
    made_from = read_manifest(project.root / "models/gpt").made_from
    again = Project(project.root / "again", project.split)
    folder = stopped(again)
    again.train(params)
    assert again.digests()[MODEL] == made
    assert "continue_from" in made_from


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("../x", {}, "is not the name of a training"),
        ("0" * 16, {}, "no checkpoint is in"),
        (None, {"model__n_layer": 1}, "model.n_layer was 2, is 1"),
        (None, {"train__optimizer": "muon"}, "train.optimizer was"),
        (None, {"train__max_steps": 6}, "has 6 steps; raise train.max_steps"),
    ],
)
def test_a_declared_training_that_cannot_be_continued_is_a_config_error(
    project: Project, name: str | None, change: dict[str, Any], reason: str
) -> None:
    folder = stopped(project)
    with pytest.raises(ConfigError, match=reason):
        project.train(tiny.params(train__continue_from=name or folder.name, **change))


def test_a_running_training_cannot_be_declared(project: Project) -> None:
    folder = stopped(project)
    with one_writer(folder), pytest.raises(ResourceError, match="a process works on"):
        project.train(tiny.params(train__continue_from=folder.name, train__lr=1e-3))


def test_abandoned_are_those_that_the_present_parameters_cannot_continue(project: Project) -> None:
    root = project.root / ".gptpipe/checkpoints"
    other = stopped(project, train__lr=1e-4)
    running = stopped(project, train__lr=1e-5)
    named = stopped(project, train__lr=1e-6)
    stopped(project)
    params = tiny.params(train__save_every=5, train__continue_from=None)
    (first, *_) = found = abandoned_trainings(root, params)
    assert {training.folder for training in found} == {other, running, named}
    assert f"(step 6, {first.n_bytes / 2**20:,.1f} MiB; train.lr was " in str(first)
    assert first.n_bytes > 100_000
    params = tiny.params(train__continue_from=named.name)
    with one_writer(running):
        assert other in {training.folder for training in abandoned_trainings(root, params)}
        assert not {running, named} & {training.folder for training in abandoned_trainings(root, params)}


def test_other_data_or_an_unknown_origin_do_not_make_a_training_abandoned(project: Project) -> None:
    """The split of the workspace may be about to change back."""
    folder = stopped(project)
    root = project.root / ".gptpipe/checkpoints"
    for path in folder.glob("step-*/state.json"):
        content = json.loads(path.read_bytes())
        content["settings"]["split"] = "f" * 64
        path.write_text(json.dumps(content))
    assert abandoned_trainings(root, tiny.params()) == []
    for path in folder.glob("step-*/state.json"):
        content = json.loads(path.read_bytes())
        path.write_text(json.dumps({**content, "settings": None}))
    assert abandoned_trainings(root, tiny.params(seed=8)) == []


EQUAL = (MODEL, "reports/train.steps.csv", "reports/train.validations.csv", "reports/train.samples.json")


def finished_and_evaluated(project: Project, **changes: Any) -> str:
    """Train to the end, remove the checkpoints, as stage evaluate does, and the output, as DVC does before a
    stage runs. Returns the run id.
    """
    project.train(tiny.params(**changes))
    for folder in trainings(project):
        discard(folder)
    run_id = read_manifest(project.root / "models/state").counts["run_id"]
    shutil.rmtree(project.root / "models/state")
    return str(run_id)


@pytest.mark.parametrize(
    ("schedule", "first"),
    [("constant", 11), ("wsd", 8)],  # of 10 steps; the rate of step 7, counted from 1, is still the peak
)
def test_a_finished_training_is_extended_bit_for_bit(
    project: Project, toy_split: Path, schedule: str, first: int
) -> None:
    """The shorter training validates at its end, step 10; the longer one does not."""
    changes = {"train__schedule": schedule, "model__dropout": 0.1}
    finished_and_evaluated(project, **changes, train__max_steps=10)
    project.train(tiny.params(**changes, train__max_steps=15))
    direct = Project(project.root / "direct", toy_split)
    direct.train(tiny.params(**changes, train__max_steps=15))
    assert first_step(project) == first
    assert {name: project.digests()[name] for name in EQUAL} == {name: direct.digests()[name] for name in EQUAL}


def test_an_extended_training_is_a_new_run_that_names_the_old_one(project: Project) -> None:
    run_id = finished_and_evaluated(project, train__schedule="constant", train__max_steps=10)
    state = json.loads((project.root / ".gptpipe/state/kept-00000010/manifest.json").read_bytes())
    project.train(tiny.params(train__schedule="constant", train__max_steps=15))
    first, second = project.records
    assert second.run_id != first.run_id
    assert summary(project)["changed_settings"] == [
        f"after step 10: continued from run {run_id}",
        "after step 10: train.max_steps was 10, is 15",
    ]
    manifest = read_manifest(project.root / "models/gpt")
    assert manifest.made_from["continue_from"] == hashlib.sha256(seal(without_digest(state))).hexdigest()
    assert [step for step, _, m in second.entries if "train/loss" in m] == list(range(1, 16))
    again = read_manifest(project.root / "models/state")
    assert (again.counts["step"], again.made_from["continue_from"]) == (15, manifest.made_from["continue_from"])


def without_digest(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key != "sha256"}


def test_an_extension_that_is_killed_ends_like_an_undisturbed_one(project: Project, toy_split: Path) -> None:
    changes = {"train__schedule": "wsd", "train__optimizer": "muon"}
    finished_and_evaluated(project, **changes, train__max_steps=10)
    with pytest.raises(Interrupted):
        project.train(tiny.params(**changes, train__max_steps=20), stop_at=16)
    verify(project.root / ".gptpipe/state")
    project.train(tiny.params(**changes, train__max_steps=20))
    direct = Project(project.root / "direct", toy_split)
    direct.train(tiny.params(**changes, train__max_steps=20))
    assert {name: project.digests()[name] for name in EQUAL} == {name: direct.digests()[name] for name in EQUAL}
    assert read_manifest(project.root / "models/state").counts["step"] == 13  # decays in the last 8 of 20 steps


@pytest.mark.parametrize(
    "change",
    [{"train__max_steps": 10}, {"train__max_steps": 9}, {"train__max_steps": 15, "train__lr": 1e-4}],
)
def test_a_state_is_not_extended_by_the_same_settings_fewer_steps_or_other_arithmetic(
    project: Project, change: dict[str, Any]
) -> None:
    finished_and_evaluated(project, train__schedule="constant", train__max_steps=10)
    project.train(tiny.params(**{"train__schedule": "constant", **change}))
    assert first_step(project) == 1
    assert "changed_settings" not in summary(project)


@pytest.mark.parametrize("change", [{"train__keep_state": False}, {"train__schedule": "linear"}])
def test_no_state_is_kept_if_it_is_not_wanted_or_of_no_use(project: Project, change: dict[str, Any]) -> None:
    """The folder exists anyway, because DVC expects each output."""
    project.train(tiny.params(**{"train__schedule": "constant", **change}))
    manifest = verify(project.root / "models/state")
    assert (manifest.files, manifest.counts) == ({}, {})


def test_a_damaged_state_is_not_extended(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    finished_and_evaluated(project, train__schedule="constant", train__max_steps=10)
    path = project.root / ".gptpipe/state/kept-00000010/state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    project.train(tiny.params(train__schedule="constant", train__max_steps=15))
    assert first_step(project) == 1
    assert "warning: cannot extend a finished training" in capsys.readouterr().err
    verify(project.root / "models/state")


def test_a_model_of_the_registry_is_whichever_its_alias_names(project: Project) -> None:
    """A training that starts from it is not abandoned, although its version and its shape are not looked up."""
    registered = {"train__init_from": "models:/gpt/3", "model__n_layer": 1}
    before = trainings(project)
    start = tiny.params(**registered)
    state, _, _ = tiny.trained_state(1, **registered)
    settings = settings_of(start, "c" * 64, {"model.safetensors": "d" * 64}, 12)
    Checkpoints(project.root / ".gptpipe/checkpoints" / settings.key, {}, settings).save(state)
    assert len(trainings(project) - before) == 1
    root = project.root / ".gptpipe/checkpoints"
    assert abandoned_trainings(root, tiny.params(train__init_from="models:/gpt@champion")) == []
    assert len(abandoned_trainings(root, tiny.params(train__init_from="data/start/base"))) == 1


def test_a_training_that_stopped_at_a_spike_continues_with_a_roll_back(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch makes the loss infinite at any step."""
    fail_at_batch(monkeypatch, project, 4)
    with pytest.raises(NumericError, match="step 5"):
        project.train(tiny.params())
    project.train(tiny.params(train__on_spike="rollback"))
    assert summary(project)["changed_settings"] == ['after step 3: train.on_spike was "stop", is "rollback"']
    assert [tag for tag in project.records[1].tagged if tag.startswith("rolled")] == ["rolled_back.00000005"]
    assert first_step(project) == 4


def test_a_training_is_not_continued_if_the_weights_that_it_started_from_are_replaced(project: Project) -> None:
    project.train(tiny.params())
    base = (project.root / "models/gpt").rename(project.root / "base")
    stopped(project, stop_at=6, train__init_from=str(base))
    project.train(tiny.params(seed=8))
    shutil.rmtree(base)
    (project.root / "models/gpt").rename(base)
    with pytest.raises(Interrupted):
        project.train(tiny.params(train__init_from=str(base)), stop_at=7)
    project.records[-2] = project.records[1]
    assert first_step(project) == 1

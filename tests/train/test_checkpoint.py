"""Checkpoints: bit-for-bit restore, detection of damage before use, and kills at any moment."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptpipe.base.finished_training import discard, discard_finished, finished_in, mark_finished
from gptpipe.base.manifest import new_folder
from gptpipe.score.metrics import VALIDATION_METRICS
from gptpipe.shell.errors import IntegrityError, ResourceError
from gptpipe.train import checkpoint
from gptpipe.train.checkpoint import Checkpoints
from gptpipe.train.state import TrainState
from gptpipe.train.step import optimizer_step

SMALL = {"model__n_embd": 8, "model__n_inner": 8, "model__n_layer": 1, "model__dropout": 0.1}
VALIDATION = [f"val/{name}" for name in VALIDATION_METRICS]
ENVIRONMENT = {"threads": 1, "torch": "9.9"}


def validated(state: TrainState, checkpoints: Checkpoints, val_loss: float) -> None:
    """Does what the session does after a validation."""
    state.add_validation(val_loss, 1.0)
    state.journal.append((state.step, 1_700_000_000_000, dict.fromkeys(VALIDATION, val_loss)))
    if state.is_best:
        checkpoints.save_best(state.model, state.step)


def saved_run(folder: Path, losses: dict[int, float], n_steps: int, **changes: Any) -> TrainState:
    """Train and save every third step. `losses`: validation losses by step."""
    checkpoints = Checkpoints(folder, ENVIRONMENT)
    state, batches, plan = tiny.trained_state(**changes)
    for step in range(n_steps + 1):
        if step:
            metrics = optimizer_step(state, batches, plan)
            state.journal.append((step, 1_700_000_000_000 + step, metrics))
        if step in losses:
            validated(state, checkpoints, losses[step])
        if step and step % 3 == 0:
            checkpoints.save(state)
    return state


def restored(
    folder: Path, environment: dict[str, Any] = ENVIRONMENT, **changes: Any
) -> tuple[TrainState, bool]:
    """Restore into a state with other weights; returns it, and whether there was a checkpoint."""
    state, _, _ = tiny.trained_state(2, seed=99, **changes)
    return state, Checkpoints(folder, environment).restore(state, allow_inexact=False)


def names(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_training_continues_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    changes = {"model__dropout": 0.2, "train__optimizer": optimizer}
    undisturbed = saved_run(tmp_path / "undisturbed", {0: 4.0, 6: 3.0}, 12, **changes)
    (tmp_path / "halves").mkdir()
    # run.json has the run id, which is random.
    shutil.copy(tmp_path / "undisturbed" / "run.json", tmp_path / "halves")
    saved_run(tmp_path / "halves", {0: 4.0, 6: 3.0}, 6, **changes)
    state, is_restored = restored(tmp_path / "halves", **changes)
    assert is_restored
    assert (state.step, len(state.journal), [v.step for v in state.history]) == (6, 8, [0, 6])
    _, batches, plan = tiny.trained_state(**changes)
    plan = replace(plan, loss=state.model.loss)
    state.model.train()
    for step in range(7, 13):
        metrics = optimizer_step(state, batches, plan)
        assert metrics["train/loss"] == undisturbed.journal[step + 1][2]["train/loss"]
    state.journal = undisturbed.journal  # times and speeds differ between two runs
    Checkpoints(tmp_path / "halves", ENVIRONMENT).save(state)
    for name in ("state.safetensors", "state.json", "journal.jsonl"):
        files = [tmp_path / half / "step-00000012" / name for half in ("undisturbed", "halves")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_generator_is_restored(tmp_path: Path) -> None:
    """Dropout has a seed for each step; what else a training draws continues here."""
    torch.manual_seed(5)
    saved_run(tmp_path, {}, 3, **SMALL)
    expected = torch.rand(4)
    torch.manual_seed(6)
    restored(tmp_path, **SMALL)
    assert torch.equal(torch.rand(4), expected)


def test_two_steps_are_kept_and_the_best_of_each(tmp_path: Path) -> None:
    saved_run(tmp_path, {0: 4.0, 3: 3.0, 6: 3.5, 8: 2.0}, 6, **SMALL)
    assert names(tmp_path) == ["best-00000003", "step-00000003", "step-00000006"]
    shutil.rmtree(tmp_path)
    saved_run(tmp_path, {0: 4.0, 3: 3.0, 6: 3.5, 8: 2.0}, 9, **SMALL)
    assert names(tmp_path) == ["best-00000003", "best-00000008", "step-00000006", "step-00000009"]
    shutil.rmtree(tmp_path)
    state = saved_run(tmp_path, {0: 4.0, 3: 3.0, 6: 3.5, 8: 2.0}, 12, **SMALL)
    assert names(tmp_path) == ["best-00000008", "step-00000009", "step-00000012"]
    again, _ = restored(tmp_path, **SMALL)
    assert again.history == state.history
    best = Checkpoints(tmp_path, ENVIRONMENT).load_best(8)
    assert set(best) == {name for name, _ in state.model.named_parameters()}
    discard(tmp_path)
    assert not tmp_path.exists()


def test_nothing_is_restored_without_a_checkpoint(tmp_path: Path) -> None:
    assert not restored(tmp_path, **SMALL)[1]


def flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(len(content)))])


def zero_a_page(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    start = int(rng.integers(len(content)))
    path.write_bytes(content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :])


def empty(path: Path, _: np.random.Generator) -> None:
    path.write_bytes(b"")


def remove(path: Path, _: np.random.Generator) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "n_times"), [(flip, 15), (truncate, 3), (zero_a_page, 3), (empty, 1), (remove, 1)]
)
@pytest.mark.parametrize(
    "name",
    [
        "step-00000006/state.safetensors",
        "step-00000006/state.json",
        "step-00000006/journal.jsonl",
        "step-00000006/manifest.json",
        "best-00000005/model.safetensors",
    ],
)
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path, np.random.Generator], None],
    n_times: int,
) -> None:
    saved_run(tmp_path / "sound", {0: 4.0, 2: 3.0, 5: 2.0}, 6, **SMALL)
    rng = np.random.default_rng(0)
    for i in range(n_times):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "sound", folder)
        before = (folder / name).read_bytes()
        damage(folder / name, rng)
        if (folder / name).exists() and (folder / name).read_bytes() == before:
            continue  # zeros were replaced by zeros
        state, _ = restored(folder, **SMALL)
        assert state.step == 3
        warning = capsys.readouterr().err
        assert "warning" in warning
        assert str(folder / name.split("/")[0]) in warning
        assert "step-00000006" not in names(folder)  # it is removed, so it cannot prevent a later save


def state_json(**changes: Any) -> Callable[[Path], object]:
    """Keys of state.json; `...` removes one."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "state.json").read_bytes()) | changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / "state.json").write_text(json.dumps(kept))

    return change


def history(**changes: Any) -> Callable[[Path], object]:
    """Keys of the last validation in state.json."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "state.json").read_bytes())
        values["history"][-1] |= changes
        (folder / "state.json").write_text(json.dumps(values))

    return change


def journal(*lines: str) -> Callable[[Path], object]:
    """Lines after those of journal.jsonl."""

    def change(folder: Path) -> None:
        path = folder / "journal.jsonl"
        path.write_bytes(path.read_bytes() + "".join(f"{line}\n" for line in lines).encode())

    return change


def tensors(
    edit: Callable[[dict[str, Tensor]], object], name: str = "state.safetensors"
) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        values = {key: value.clone() for key, value in load_file(folder / name).items()}
        edit(values)
        save_file(values, folder / name)

    return change


def content(name: str, written: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(written)


DEEP = "[" * 100_000 + "]" * 100_000
NORM, MOMENT, COUNT = (
    "model.final_norm.weight",
    "optimizer.final_norm.weight.exp_avg",
    "optimizer.final_norm.weight.step",
)

FORGERIES: dict[str, Callable[[Path], object]] = {
    **{
        f"no {key}": state_json(**{key: ...})
        for key in ("step", "run_id", "best_step", "history", "skipped", "micro_batch_size", "environment")
    },
    **{
        f"{key} {value!r:.9}": state_json(**{key: value})
        for key in ("step", "best_step", "skipped", "micro_batch_size")
        for value in (-1, 2**70, True, 6.0, "6")
    },
    "a run id that is none": state_json(run_id="../x"),
    "micro-batches of 0": state_json(micro_batch_size=0),
    "another step than the folder's": state_json(step=3),
    "another best step": state_json(best_step=2),
    "a best step that is nowhere": state_json(best_step=4),
    "no best step": state_json(best_step=None),
    "no history": state_json(history=[]),
    "a history of numbers": state_json(history=[1, 2, 3]),
    "a history that is a table": state_json(history={}),
    "a NaN loss": history(val_loss=float("nan")),
    "an infinite loss": history(val_loss=float("inf")),
    "a loss as text": history(val_loss="2.0"),
    "another loss than the journal's": history(val_loss=1.9),
    "a validation of the future": history(step=7),
    "a validation out of order": history(step=0),
    "an environment that is a list": state_json(environment=[]),
    "an environment of lists": state_json(environment={"threads": [1], "torch": "9.9"}),
    "inexact as a number": state_json(inexact=3),
    "deep state": content("state.json", DEEP),
    "deep samples": content("state.json", f'{{"samples": {DEEP}}}'),
    "empty state": content("state.json", ""),
    "state that is a list": content("state.json", "[]"),
    "an entry that is a table": journal("{}"),
    "an entry of one": journal("[1]"),
    "an entry of four": journal("[6, 1700000000000, {}, 1]"),
    "an entry of a fraction of a step": journal("[5.5, 1700000000000, {}]"),
    "an entry of the future": journal("[7, 1700000000000, {}]"),
    "an entry of the past": journal("[-1, 1700000000000, {}]"),
    "a metric that is text": journal('[6, 1700000000000, {"a": "b"}]'),
    "a metric that is NaN": journal('[6, 1700000000000, {"a": NaN}]'),
    "a metric that is infinite": journal('[6, 1700000000000, {"a": Infinity}]'),
    "a metric of 10^400": journal(f'[6, 1700000000000, {{"a": {10**400}.0}}]'),
    "a step without its metrics": journal('[6, 1700000000000, {"train/loss": 1.0}]'),
    "a validation too many": journal(f"[6, 1700000000000, {json.dumps(dict.fromkeys(VALIDATION, 1.0))}]"),
    "a validation without its accuracy": journal('[6, 1700000000000, {"val/loss": 1.0}]'),
    "a deep entry": journal(DEEP),
    "an empty line": journal(""),
    "no journal": content("journal.jsonl", ""),
    "a missing weight": tensors(lambda t: t.pop(NORM)),
    "a missing moment": tensors(lambda t: t.pop(MOMENT)),
    "no generator": tensors(lambda t: t.pop("generator.cpu")),
    "an unknown weight": tensors(lambda t: t.update({"model.more": torch.ones(1)})),
    "an unknown moment": tensors(lambda t: t.update({"optimizer.final_norm.weight.more": torch.ones(8)})),
    "an unknown tensor": tensors(lambda t: t.update({"a\nb": torch.ones(1)})),
    "a weight that would be broadcast": tensors(lambda t: t.update({NORM: torch.ones(1)})),
    "a moment that would be broadcast": tensors(lambda t: t.update({MOMENT: torch.ones(1)})),
    "a count of another shape": tensors(lambda t: t.update({COUNT: torch.ones(8)})),
    "a weight of another type": tensors(lambda t: t.update({NORM: t[NORM].double()})),
    "a moment of another type": tensors(lambda t: t.update({MOMENT: t[MOMENT].half()})),
    "a generator of another size": tensors(
        lambda t: t.update({"generator.cpu": t["generator.cpu"][:-1].clone()})
    ),
    "a generator of another type": tensors(lambda t: t.update({"generator.cpu": t["generator.cpu"].float()})),
    "a generator of nonsense": tensors(lambda t: t["generator.cpu"].fill_(255)),
    "no tensors": content("state.safetensors", ""),
}

BEST_FORGERIES: dict[str, Callable[[Path], object]] = {
    "a missing weight": tensors(lambda t: t.pop("final_norm.weight"), "model.safetensors"),
    "a weight that would be broadcast": tensors(
        lambda t: t.update({"final_norm.weight": torch.ones(1)}), "model.safetensors"
    ),
    "a weight of another type": tensors(
        lambda t: t.update({"final_norm.weight": torch.ones(8).half()}), "model.safetensors"
    ),
    "no tensors": content("model.safetensors", ""),
    "no file": lambda folder: (folder / "model.safetensors").unlink(),
}


def forge(folder: Path, change: Callable[[Path], object]) -> None:
    """Change a folder and write a new manifest, so that the folder looks sound."""
    shutil.copytree(folder, folder.parent / "copy")
    with new_folder(folder, {}) as new:
        for path in (folder.parent / "copy").iterdir():
            if path.name != "manifest.json":
                shutil.copy(path, new.path)
        change(new.path)
    shutil.rmtree(folder.parent / "copy")


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    saved_run(folder, {0: 4.0, 2: 3.0, 5: 2.0}, 6, **SMALL)
    return folder


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(pytest.param("step-00000006", change, id=name) for name, change in FORGERIES.items()),
        *(pytest.param("best-00000005", change, id=f"best: {name}") for name, change in BEST_FORGERIES.items()),
    ],
)
def test_a_forged_checkpoint_is_not_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sound_run: Path,
    name: str,
    change: Callable[[Path], object],
) -> None:
    """Its manifest is valid, but its content is not what a training saves."""
    shutil.copytree(sound_run, tmp_path / "run")
    forge(tmp_path / "run" / name, change)
    state, is_restored = restored(tmp_path / "run", **SMALL)
    warning = capsys.readouterr().err
    assert (state.step, is_restored) == (3, True)
    assert len(warning.splitlines()) == 1
    assert "trying the previous checkpoint" in warning
    assert len(warning) < 1000


def test_a_forgery_that_changes_nothing_is_used(tmp_path: Path, sound_run: Path) -> None:
    shutil.copytree(sound_run, tmp_path / "run")
    forge(tmp_path / "run/step-00000006", lambda folder: None)
    forge(tmp_path / "run/best-00000005", lambda folder: None)
    assert restored(tmp_path / "run", **SMALL)[0].step == 6


@pytest.mark.parametrize(
    "name", ["micro-batches of 0", "a moment that would be broadcast", "a generator of nonsense"]
)
def test_a_failed_restore_changes_nothing(tmp_path: Path, sound_run: Path, name: str) -> None:
    shutil.copytree(sound_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/step-00000003")
    forge(tmp_path / "run/step-00000006", FORGERIES[name])
    state, _, _ = tiny.trained_state(2, seed=99, **SMALL)
    before, generator = checkpoint._tensors(state), torch.get_rng_state()
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(IntegrityError, match="no checkpoint is sound"):
        Checkpoints(tmp_path / "run", ENVIRONMENT).restore(state, allow_inexact=False)
    after = checkpoint._tensors(state)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(generator, torch.get_rng_state())
    assert (state.step, state.history, state.journal, state.micro_batch_size) == (2, [], [], 4)


def test_integers_in_the_journal_stay_integers(tmp_path: Path) -> None:
    """A resumed training saves the same bytes as an undisturbed one."""
    state, _, _ = tiny.trained_state(1, **SMALL)
    state.journal.append((1, 1_700_000_000_000, {"train/micro_batch_size": 2, "a": 2.0}))
    state.step = 1
    Checkpoints(tmp_path, ENVIRONMENT).save(state)
    again, _ = restored(tmp_path, **SMALL)
    assert json.dumps(again.journal) == json.dumps(state.journal)


def test_a_checkpoint_damaged_after_it_was_written_does_not_prevent_the_next_save(tmp_path: Path) -> None:
    saved_run(tmp_path, {0: 4.0, 2: 3.0, 5: 2.0}, 6, **SMALL)
    state, _ = restored(tmp_path, **SMALL)
    (tmp_path / "step-00000006/state.json").write_text("{")
    state.step = 7
    Checkpoints(tmp_path, ENVIRONMENT).save(state)
    assert names(tmp_path) == ["best-00000002", "best-00000005", "step-00000006", "step-00000007"]


def test_a_save_after_a_fallback_keeps_sound_checkpoints(tmp_path: Path) -> None:
    """Regression: the damaged one, which has a higher number, counted as one of the two that are kept."""
    saved_run(tmp_path, {0: 4.0, 2: 3.0, 5: 2.0}, 6, **SMALL)
    (tmp_path / "step-00000006" / "state.json").write_text("{")
    state, _ = restored(tmp_path, **SMALL)
    state.step = 4
    Checkpoints(tmp_path, ENVIRONMENT).save(state)
    assert names(tmp_path) == ["best-00000002", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_no_sound_checkpoint_is_an_integrity_error(tmp_path: Path, name: str) -> None:
    saved_run(tmp_path, {0: 4.0}, 6, **SMALL)
    for step in (3, 6):
        flip(tmp_path / f"step-{step:08d}" / name, np.random.default_rng(step))
    with pytest.raises(IntegrityError, match="no checkpoint is sound") as caught:
        restored(tmp_path, **SMALL)
    assert caught.value.exit_code == 4


def test_another_environment_is_refused_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_run(tmp_path, {0: 4.0}, 3, **SMALL)
    other = {"threads": 2, "torch": "9.9"}
    with pytest.raises(ResourceError, match="threads was 1, is 2") as caught:
        restored(tmp_path, other, **SMALL)
    assert "torch" not in str(caught.value)
    state, _, _ = tiny.trained_state(**SMALL)
    assert Checkpoints(tmp_path, other).restore(state, allow_inexact=True)
    assert state.step == 3
    assert "not bit for bit: threads was 1, is 2" in capsys.readouterr().err


def test_an_inexact_resume_is_remembered_in_later_checkpoints(tmp_path: Path) -> None:
    saved_run(tmp_path, {0: 4.0}, 3, **SMALL)
    state, _, _ = tiny.trained_state(**SMALL)
    other = Checkpoints(tmp_path, {"threads": 2, "torch": "9.9"})
    other.restore(state, allow_inexact=True)
    state.step = 4
    other.save(state)
    again = Checkpoints(tmp_path, other.environment)
    again.restore(state, allow_inexact=False)
    assert again.inexact == other.inexact == ["after step 3: threads was 1, is 2"]


def test_a_checkpoint_of_an_earlier_version_is_refused_because_of_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a traceback for the keys that it lacks."""
    really = checkpoint.write_json
    monkeypatch.setattr(
        checkpoint,
        "write_json",
        lambda path, value: really(path, {k: v for k, v in value.items() if k != "inexact"}),
    )
    saved_run(tmp_path, {0: 4.0}, 3, **SMALL)
    with pytest.raises(ResourceError, match="threads was 1, is 2"):
        restored(tmp_path, {"threads": 2, "torch": "9.9"}, **SMALL)


def test_the_provisional_run_id_is_kept_unless_its_file_is_damaged(tmp_path: Path) -> None:
    name = Checkpoints(tmp_path, ENVIRONMENT).provisional_run_id()
    assert len(name) == 32
    assert Checkpoints(tmp_path, ENVIRONMENT).provisional_run_id() == name
    (tmp_path / "run.json").write_bytes(b"{}")  # damaged: a new id, not a traceback
    other = Checkpoints(tmp_path, ENVIRONMENT).provisional_run_id()
    assert name != other == Checkpoints(tmp_path, ENVIRONMENT).provisional_run_id()


def test_a_resumed_training_keeps_its_run_id_if_run_json_is_lost(tmp_path: Path) -> None:
    """It would otherwise become a second run in the store, and the first would stay RUNNING."""
    saved_run(tmp_path, {0: 4.0}, 3, **SMALL)
    run_id = Checkpoints(tmp_path, ENVIRONMENT).provisional_run_id()
    (tmp_path / "run.json").unlink()
    state, _, _ = tiny.trained_state(2, seed=99, **SMALL)
    checkpoints = Checkpoints(tmp_path, ENVIRONMENT)
    assert checkpoints.restore(state, allow_inexact=False)
    assert checkpoints.provisional_run_id() == run_id


def test_a_finished_training_is_discarded_by_its_run_id(tmp_path: Path) -> None:
    for key, run_id in (("a", "one"), ("b", "two")):
        (tmp_path / key).mkdir()
        mark_finished(tmp_path / key, run_id, {"threads": 1})
    (tmp_path / "c").mkdir()  # not finished
    assert finished_in(tmp_path / "a") == {"run_id": "one", "environment": {"threads": 1}}
    assert finished_in(tmp_path / "c") == {}
    discard_finished(tmp_path, "two")
    assert names(tmp_path) == ["a", "c"]
    (tmp_path / "a" / "finished.json").write_bytes(b"[]")
    assert finished_in(tmp_path / "a") == {}
    discard_finished(tmp_path, "one")
    assert names(tmp_path) == ["a", "c"]


def interrupted_in_a_fork(
    work: Callable[[], object], at: int, error: int | None = None, lasts: bool = False
) -> int:
    """Run `work` in a forked process that is killed before its change of the disk number `at`.

    With `error`, that change fails with this errno instead, and with `lasts` all later ones too. Returns the
    exit code: 9 after the kill, 5 for a ResourceError, 1 for any other error, 7 if `work` ended well despite
    the failure, and 0 if it made fewer changes.
    """
    pid = os.fork()
    if pid == 0:
        n_before = at

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal n_before
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                n_before -= 1
                if n_before < 0 and error is None:
                    os._exit(9)
                if n_before == -1 or (n_before < 0 and lasts):
                    raise OSError(error, os.strerror(error or 0))

        try:
            sys.addaudithook(count)
            work()
        except ResourceError:
            os._exit(5)
        except BaseException:
            os._exit(1)
        os._exit(0 if n_before >= 0 else 7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


WORK: dict[str, Callable[[Checkpoints, TrainState], object]] = {
    "save": lambda checkpoints, state: checkpoints.save(state),
    "save_best": lambda checkpoints, state: checkpoints.save_best(state.model, state.step),
    "discard": lambda checkpoints, _: discard(checkpoints.folder),
}


@pytest.fixture(scope="module")
def run_before_save(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """A folder whose newest checkpoint is of step 6, and the state at step 9, which was not saved."""
    folder = tmp_path_factory.mktemp("before")
    state = saved_run(folder, {0: 4.0, 3: 3.0, 5: 2.5, 6: 2.0}, 6, **SMALL)
    state.step = 9
    return folder, state


def interrupted_at_every_change(
    run_before_save: tuple[Path, TrainState],
    folder: Path,
    name: str,
    error: int | None = None,
    lasts: bool = False,
) -> Iterator[tuple[int, int | None]]:
    """Interrupt a piece of work at each of its changes of the disk, each time in a fresh copy of the run.

    Yields the exit code of the work, and the step that a restore returns to; None without a checkpoint. Checks
    that the restore warns of nothing, finds the best weights, and leaves no partial folder.
    """
    sound, state = run_before_save
    code, at = None, 0
    while code != 0:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        checkpoints = Checkpoints(folder, ENVIRONMENT)
        code = interrupted_in_a_fork(partial(WORK[name], checkpoints, state), at, error, lasts)
        restored_state, is_restored = restored(folder, **SMALL)
        if is_restored:
            assert restored_state.best is not None
            checkpoints.load_best(restored_state.best.step)
        assert not folder.exists() or not [entry for entry in names(folder) if entry.startswith(".")]
        yield code, restored_state.step if is_restored else None
        at += 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("save", {6, 9}), ("save_best", {6}), ("discard", {6, None})])
def test_a_run_can_be_resumed_after_a_kill_before_any_change_of_the_disk(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run_before_save: tuple[Path, TrainState],
    name: str,
    steps: set[int | None],
) -> None:
    endings = list(interrupted_at_every_change(run_before_save, tmp_path / "killed", name))
    assert "warning" not in capsys.readouterr().err
    assert len(endings) > 7
    assert {code for code, _ in endings} == {9, 0}
    assert {step for _, step in endings} == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error", "lasts"),
    [
        ("save", errno.ENOSPC, False),
        ("save", errno.EIO, True),
        ("save_best", errno.ENOSPC, False),
        ("discard", errno.EIO, True),
    ],
)
def test_a_change_of_the_disk_that_fails_is_a_resource_error_and_the_run_can_be_resumed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run_before_save: tuple[Path, TrainState],
    name: str,
    error: int,
    lasts: bool,
) -> None:
    endings = list(interrupted_at_every_change(run_before_save, tmp_path / "failed", name, error, lasts))
    assert "warning" not in capsys.readouterr().err
    assert len(endings) > 7
    assert {5, 0} <= {code for code, _ in endings} <= {5, 7, 0}
    assert {step for _, step in endings} <= ({6, 9, None} if name == "discard" else {6, 9})

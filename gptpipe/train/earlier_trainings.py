"""Checkpoints of other trainings: which of them this training continues, and which are abandoned.

The settings of a training name its checkpoint folder. If they change before the training is finished,
the folder stays.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpipe.base.finished_training import finished_in
from gptpipe.shell.errors import ConfigError, IntegrityError, ResourceError
from gptpipe.shell.locks import disk_errors, is_locked, one_writer, sync_folder
from gptpipe.train.checkpoint import SavedState, checkpoints_in, environment_changes, kept_in, read_state
from gptpipe.train.params import RunParams
from gptpipe.train.settings import Settings, changed_settings, harmful_changes, preventing_changes, settings_of

_TRAINING_NAME = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Present:
    """What a training compares the states of other trainings with."""

    folder: Path  # its checkpoint folder
    settings: Settings
    environment: dict[str, Any]
    allow_inexact: bool


@dataclass(frozen=True)
class EarlierState:
    """A checkpoint of another training, compared with the present settings and environment."""

    checkpoint: Path
    saved: SavedState
    harmful: list[str]  # the changes with which its steps would have been others
    preventing: list[str]  # the changes with which it cannot be continued at all

    @property
    def training(self) -> Path:
        """The folder of the training."""
        return self.checkpoint.parent

    def __str__(self) -> str:
        return f"step {self.saved.step:,} of {self.training}"


def take_over(present: Present) -> EarlierState | None:
    """Move the checkpoints of an unfinished training here, if the present settings would give the same steps.

    Of several trainings, chooses the one with most steps. Returns its newest state, or None. The caller holds
    the lock on the present folder. Raises ResourceError.
    """
    if present.folder.exists():  # this training has begun
        return None
    exact = [state for state in _unfinished(present) if not state.harmful]
    if not exact:
        return None
    longest = max(exact, key=lambda state: state.saved.step)
    with one_writer(longest.training), disk_errors(present.folder):
        longest.training.rename(present.folder)
        sync_folder(present.folder.parent)
    return longest


def kept_state(present: Present, exported: Path) -> EarlierState | None:
    """The longest kept state of a shorter training, if the present settings would have given the same steps.

    `exported` is the folder with the kept state of the last finished training in this project.
    """
    folders = [path for path in sorted(present.folder.parent.glob("[!.]*/")) if path != present.folder]
    compared = [_compared(kept, present) for folder in (*folders, exported) for kept in kept_in(folder)]
    exact = [
        state
        for state in compared
        if state and state.saved.settings and state.saved.settings.n_steps < present.settings.n_steps
        if not state.harmful
    ]
    return max(exact, key=lambda state: state.saved.step, default=None)


def advice(present: Present) -> str | None:
    """Which unfinished training could be continued despite other settings, and how; None if there is none.

    Of several trainings, the one with fewest differences.
    """
    possible = [state for state in _unfinished(present) if state.harmful and not state.preventing]
    if not possible:
        return None
    nearest = min(possible, key=lambda state: (len(state.harmful), -state.saved.step))
    return (
        f"an unfinished training is kept, at {nearest}; {'; '.join(nearest.harmful)}; "
        "to continue it from this step with the present values, "
        f"set train.continue_from to {nearest.training.name}"
    )


def declared_state(present: Present, name: str) -> EarlierState:
    """The newest state of the training that `train.continue_from` names. Raises ConfigError, ResourceError."""
    if not _TRAINING_NAME.fullmatch(name):
        raise ConfigError(
            f"train.continue_from: {name!r:.100} is not the name of a training in .gptpipe/checkpoints, "
            "which has 16 characters; a training that could be continued prints it"
        )
    training = present.folder.with_name(name)
    if is_locked(training):
        raise ResourceError(
            f"train.continue_from: a process works on {training}; wait until it ends, or stop it"
        )
    states = [state for checkpoint in checkpoints_in(training) if (state := _compared(checkpoint, present))]
    if not states:
        raise ConfigError(
            f"train.continue_from: no checkpoint is in {training}; set it to null to train from step 0"
        )
    newest = states[-1]
    if newest.preventing:
        raise ConfigError(
            f"train.continue_from: cannot continue {newest}: {'; '.join(newest.preventing)}; "
            "set these back, or set train.continue_from to null"
        )
    if newest.saved.step >= present.settings.n_steps:
        raise ConfigError(
            f"train.continue_from: {newest} is not before the end of this training, which has "
            f"{present.settings.n_steps:,} steps; raise train.max_steps or train.epochs"
        )
    return newest


def _unfinished(present: Present) -> list[EarlierState]:
    """The newest state of each other unfinished training on which no process works."""
    states = []
    for folder in sorted(present.folder.parent.glob("[!.]*/")):
        checkpoints = checkpoints_in(folder)
        if folder != present.folder and checkpoints and not finished_in(folder) and not is_locked(folder):
            states.append(_compared(checkpoints[-1], present))
    return [state for state in states if state]


def _compared(checkpoint: Path, present: Present) -> EarlierState | None:
    """None for a checkpoint that cannot be read, or that an earlier version of gptpipe has saved."""
    try:
        saved = read_state(checkpoint)
    except IntegrityError:  # `gptpipe doctor` reports it
        return None
    if saved.settings is None:
        return None
    changes = changed_settings(saved.settings, present.settings)
    harmful = harmful_changes(saved.settings, present.settings, saved.step)
    environment = [] if present.allow_inexact else environment_changes(saved.environment, present.environment)
    preventing = preventing_changes(changes)
    return EarlierState(checkpoint, saved, [*harmful.values(), *environment], [*preventing.values()])


@dataclass(frozen=True)
class AbandonedTraining:
    """A checkpoint folder that no training with the present parameters would continue."""

    folder: Path
    step: int
    n_bytes: int
    harmful: list[str]

    def __str__(self) -> str:
        return f"{self.folder} (step {self.step:,}, {self.n_bytes / 2**20:,.1f} MiB; {'; '.join(self.harmful)})"


def abandoned_trainings(root: Path, params: RunParams) -> list[AbandonedTraining]:
    """The abandoned ones among the trainings in `root`.

    Only the parameters of the training itself count. The data may be about to change, so other data does not
    make a training abandoned. Nor is a training abandoned that a process works on, that `train.continue_from`
    names, or whose settings are unknown.
    """
    abandoned = []
    for folder in sorted(root.glob("[!.]*/")):
        checkpoints = checkpoints_in(folder)
        if not checkpoints or folder.name == params.train.continue_from or is_locked(folder):
            continue
        harmful = [_harmful_for(checkpoint, params) for checkpoint in (*kept_in(folder), *checkpoints)]
        if all(harmful):
            n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            step = read_state(checkpoints[-1]).step
            abandoned.append(AbandonedTraining(folder, step, n_bytes, harmful[-1]))
    return abandoned


def _harmful_for(checkpoint: Path, params: RunParams) -> list[str]:
    """The changes of parameters with which the steps of a checkpoint would have been others."""
    try:
        saved = read_state(checkpoint)
    except IntegrityError:  # reported by another check
        return []
    if saved.settings is None:
        return []
    # With `epochs`, the number of steps depends on the data.
    n_steps = params.train.max_steps if params.train.epochs is None else saved.settings.n_steps
    earlier = saved.settings
    present = settings_of(params, earlier.split, earlier.initial_weights, n_steps or earlier.n_steps)
    present = _with_same_start(present, earlier)
    return [*harmful_changes(earlier, present, saved.step).values()]


def _with_same_start(present: Settings, earlier: Settings) -> Settings:
    """`present` with what follows from `train.init_from`: the version of a registered model, and the shape.

    They are not looked up, so any version may be the one that is meant.
    """
    start, earlier_start = present.train["init_from"], earlier.train.get("init_from")
    if not start or not earlier_start:
        return present
    is_registered = start.startswith("models:") and earlier_start.startswith("models:")
    train = {**present.train, "init_from": earlier_start if is_registered else start}
    return present.model_copy(update={"train": train, "model": earlier.model})

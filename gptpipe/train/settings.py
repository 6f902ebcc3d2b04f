"""The settings of a training, and whether a training may continue after some of them have changed.

The settings are the parameters, the digests of the split and of the initial weights, and the number of steps. A
checkpoint contains those that it was trained with. A change is harmless if every step so far would have had the
same bits under the present settings.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gptpipe.base.files import to_json
from gptpipe.train.params import RunParams, TrainParams
from gptpipe.train.schedule import learning_rate

# Parameters that change no bit of a step. The device, the precision and the compiler that they resolve to are
# compared as parts of the environment. Another size of micro-batches rounds sums differently: it is the one
# exception, because a user lowers it when memory runs out, and the change is recorded.
_HARMLESS = frozenset(
    {
        "train.launcher",
        "train.parallel",
        "train.micro_batch_size",
        "train.activation_checkpointing",
        "train.on_spike",
        "train.spike_sigmas",
        "train.eval_every",
        "train.save_every",
        "train.keep_state",
        "train.patience",
        "train.sample_prompts",
        "train.sample_tokens",
        "train.device",
        "train.precision",
        "train.compile",
    }
)
# Parameters that act on a step only through its learning rate.
_OF_LEARNING_RATE = frozenset(
    {
        "train.schedule",
        "train.warmup_steps",
        "train.decay_fraction",
        "train.final_lr_fraction",
        "train.epochs",
        "train.max_steps",
    }
)
_NOT_IN_KEY = ("launcher", "parallel", "on_spike")
# With other values of these, the saved tensors do not fit, or mean something else.
_OF_TENSORS = ("split", "train.optimizer", "model.")
_NOT_OF_TENSORS = ("model.dropout",)


class Settings(BaseModel):
    """The settings of a training, in the types of JSON."""

    model_config = ConfigDict(frozen=True, strict=True)

    seed: int
    model: dict[str, Any]
    train: dict[str, Any]
    split: str  # digest of its manifest
    initial_weights: dict[str, str]  # SHA-256 by file name; empty if they are drawn
    n_steps: int

    @property
    def key(self) -> str:
        """Name of the checkpoint folder: a digest of the settings, but not of how processes are started.

        Nor of `on_spike`, so that a training that a spike has stopped before its first checkpoint keeps its
        folder, which names its run. The environment is compared on restore.
        """
        train = {name: value for name, value in self.train.items() if name not in _NOT_IN_KEY}
        return hashlib.sha256(to_json({**self.model_dump(), "train": train})).hexdigest()[:16]


def settings_of(params: RunParams, split: str, initial_weights: dict[str, str], n_steps: int) -> Settings:
    values = params.model_dump(mode="json", include={"seed", "model", "train"})
    return Settings(**values, split=split, initial_weights=initial_weights, n_steps=n_steps)


def changed_settings(earlier: Settings, present: Settings) -> dict[str, str]:
    """Each setting that differs -> `name was ..., is ...`. The number of steps follows from the others."""
    before, now = _flat(earlier), _flat(present)
    names = sorted((before.keys() | now.keys()) - {"n_steps"})
    return {
        name: f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    }


def harmful_changes(earlier: Settings, present: Settings, n_done: int) -> dict[str, str]:
    """The changes with which the first `n_done` steps would have been others."""
    changes = {name: text for name, text in changed_settings(earlier, present).items() if name not in _HARMLESS}
    if changes.keys() <= _OF_LEARNING_RATE and _learning_rates_are_equal(earlier, present, n_done):
        return {}
    return changes


def preventing_changes(changes: dict[str, str]) -> dict[str, str]:
    """The changes with which a checkpoint cannot be continued at all."""
    return {
        name: text
        for name, text in changes.items()
        if name.startswith(_OF_TENSORS) and name not in _NOT_OF_TENSORS
    }


def _learning_rates_are_equal(earlier: Settings, present: Settings, n_done: int) -> bool:
    """Whether the first `n_done` steps have the same learning rates, and both trainings have so many steps."""
    try:
        before, now = (TrainParams.model_validate_json(json.dumps(part.train)) for part in (earlier, present))
    except ValidationError:  # of an earlier version
        return False
    n_before, n_now = earlier.n_steps, present.n_steps
    return n_done <= n_now and all(
        learning_rate(step, n_before, before) == learning_rate(step, n_now, now) for step in range(n_done)
    )


def _flat(settings: Settings) -> dict[str, Any]:
    """Name, with that of the section -> value."""
    flat = settings.model_dump(exclude={"model", "train"})
    for section in ("model", "train"):
        flat |= {f"{section}.{name}": value for name, value in getattr(settings, section).items()}
    return flat


def _shown(value: Any) -> str:
    """A value as in params.yaml, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."

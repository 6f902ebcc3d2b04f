"""Resumable training state on disk, in `.gptpipe/checkpoints/KEY/`, outside DVC.

    run.json                 the provisional id of the training's run, chosen before the first step; the value
                             of on_spike; the id of the run that this run continues
    best-00000400/           weights of the best model so far, by validation loss
    step-00000500/           state.safetensors (weights, optimizer, generators), journal.jsonl (every logged
                             metric, with its step and time) and state.json (everything else, with the settings)
    kept-00000400/           the state that a longer training can continue, like that of a step
    finished.json            the training is finished; see gptpipe/base/finished_training.py

Every folder has a manifest and is checked before use; nothing is pickled. Two steps are kept, and the older one
is removed only after the newer one has been read back. A folder appears and disappears under its name in one
operation.
"""

import json
import shutil
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gptpipe.base.files import (
    first_fault,
    read_json,
    seal,
    unseal,
    write_bytes,
    write_json,
)
from gptpipe.base.manifest import new_folder, read_manifest, verify
from gptpipe.model.device import gather, shard_like
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import WEIGHTS, read_header
from gptpipe.score.metrics import VALIDATION_METRICS
from gptpipe.shell.console import complain
from gptpipe.shell.errors import IntegrityError, ResourceError, first_line
from gptpipe.shell.locks import disk_errors, sync_folder
from gptpipe.train.distributed import is_writer
from gptpipe.train.optim import Muon
from gptpipe.train.settings import Settings, changed_settings
from gptpipe.train.state import Entry, Sample, TrainState, Validation

_N_KEPT = 2  # step folders
_STATE, _TENSORS, _JOURNAL, _RUN = "state.json", "state.safetensors", "journal.jsonl", "run.json"
_MAX_STATE_BYTES = 1 << 28  # the history has 150 bytes for each validation
_STEP_METRICS = {"train/loss", "train/grad_norm", "train/lr"}  # metrics that a resume or the reports need
_VALIDATION_KEYS = {f"val/{name}" for name in VALIDATION_METRICS}
_OPTIMIZER_TENSORS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}
_Step = Annotated[int, Field(ge=0, lt=2**40)]
# Whole numbers stay whole, so that a journal that is read and saved again has the same bytes.
_ENTRY: TypeAdapter[Entry] = TypeAdapter(tuple[int, int, dict[str, int | FiniteFloat]])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a training, from the oldest to the newest."""
    return sorted(folder.glob("step-*/"))


def kept_in(folder: Path) -> list[Path]:
    """The states of a training that are kept beyond its end."""
    return sorted(folder.glob("kept-*/"))


class Checkpoints:
    """Saves and restores the state of one training in a folder that the caller has locked."""

    def __init__(self, folder: Path, environment: dict[str, Any], settings: Settings | None = None) -> None:
        self.folder, self.environment, self.settings = folder, environment, settings
        self.inexact: list[str] = []  # after which steps the environment changed, and how
        self.changes: list[str] = []  # after which steps the settings changed, and how
        self.changed_now: dict[str, str] = {}  # settings that differ from those of the restored checkpoint
        self.ancestors: dict[str, str] = {}  # digest of the checkpoint of another run that this one continues
        self._run_id: str | None = None

    def provisional_run_id(self) -> str:
        """The provisional id of this training's run.

        Created and saved at the first call, so it survives a kill.
        """
        self._run_id = self._run_id or self._saved_run().get("run_id")
        if self._run_id is None:
            self._run_id = uuid.uuid4().hex
            write_bytes(self.folder / _RUN, seal({"run_id": self._run_id}))
        return self._run_id

    def choose_run(self, on_spike: str, *, is_finished: bool) -> str | None:
        """Choose the run for this value of `on_spike`; returns the id of the run that a new one continues.

        With `stop`, points are recorded before they are saved. Roll-backs would give some of them other values,
        but a record never changes a point. So a training that changes to `rollback` gets a new run.
        """
        saved = self._saved_run()
        chosen = {**saved, "run_id": self.provisional_run_id(), "on_spike": on_spike}
        if saved.get("on_spike") == "stop" and on_spike == "rollback" and not is_finished:
            chosen |= {"run_id": uuid.uuid4().hex, "continues": self.provisional_run_id()}
        self._run_id = chosen["run_id"]
        if chosen != saved:
            write_bytes(self.folder / _RUN, seal(chosen))
        return chosen.get("continues")

    def _saved_run(self) -> dict[str, str]:
        """The content of run.json; empty if there is no training yet, or if it is damaged."""
        with suppress(OSError, ValueError):
            return unseal((self.folder / _RUN).read_bytes())
        return {}

    def save(self, state: TrainState) -> None:
        """Make the state durable, then drop what is no longer needed.

        All ranks must call, and rank 0 writes.
        """
        self._write(state, self.folder / _folder_name(state.step))
        if is_writer():
            self._drop_old()

    def keep(self, state: TrainState) -> None:
        """Make the state durable until the folder is removed, replacing an earlier one. All ranks must call."""
        target = self.folder / f"kept-{state.step:08d}"
        self._write(state, target)
        for old in kept_in(self.folder) if is_writer() else ():
            if old != target:
                _discard(old)

    def _write(self, state: TrainState, target: Path) -> None:
        tensors = _tensors(state)
        if not is_writer():
            return
        with new_folder(target, self.ancestors) as new:
            write_bytes(new.path / _TENSORS, save(tensors))
            write_bytes(
                new.path / _JOURNAL, "".join(json.dumps(entry) + "\n" for entry in state.journal).encode()
            )
            content = {
                "step": state.step,
                "run_id": self.provisional_run_id(),
                "best_step": state.best.step if state.best else None,
                "history": [asdict(validation) for validation in state.history],
                "samples": state.samples,
                "skipped": state.skipped,
                "micro_batch_size": state.micro_batch_size,
                "environment": self.environment,
                "inexact": self.inexact,
                "settings": self.settings and self.settings.model_dump(),
                "changes": self.changes,
            }
            write_json(new.path / _STATE, content)
        verify(target)

    def restore(self, state: TrainState, *, allow_inexact: bool) -> bool:
        """Load the newest sound checkpoint into `state`; returns False if there is no checkpoint.

        If a checkpoint is damaged, warns and falls back to the previous one. Raises IntegrityError if none is
        sound, and ResourceError if this environment cannot continue bit for bit, unless `allow_inexact`.
        """
        if is_writer():
            self._remove_leftovers()
        candidates = checkpoints_in(self.folder)[::-1]
        for i, candidate in enumerate(candidates):
            try:
                saved = self._read(candidate, state)
            except IntegrityError as error:
                complain(f"warning: {str(error).split(';')[0]}; trying the previous checkpoint")
                continue
            self._check_environment(saved.content, allow_inexact)
            self._note_changes(saved.content)
            self.ancestors = read_manifest(candidate).made_from
            saved.copy_to(state)
            # run.json may have been lost. If not, it may name a newer run than the checkpoint.
            self._run_id = self._run_id or self._saved_run().get("run_id") or saved.content.run_id
            for unsound in candidates[:i] if is_writer() else ():
                _discard(unsound)
            return True
        if candidates:
            raise IntegrityError(
                f"{self.folder}: no checkpoint is sound; remove the folder to train from the start"
            )
        return False

    def continue_from(self, checkpoint: Path, state: TrainState) -> None:
        """Load a checkpoint of another training into `state`, and save it as the first checkpoint of this one.

        This training keeps its own run, and the journal of the earlier steps is copied. Another environment is
        recorded, not refused. Raises IntegrityError for a damaged checkpoint, and ResourceError.
        """
        origin = Checkpoints(checkpoint.parent, self.environment, self.settings)
        saved = origin._read(checkpoint, state)
        origin._check_environment(saved.content, allow_inexact=True)
        origin._note_changes(saved.content)
        saved.copy_to(state)
        self.inexact, self.changed_now = origin.inexact, origin.changed_now
        source = f"after step {state.step}: continued from run {saved.content.run_id}"
        self.changes = [*saved.content.changes, source, *origin.changes[len(saved.content.changes) :]]
        self.ancestors = {"continue_from": read_manifest(checkpoint).digest}
        if is_writer() and state.best is not None:
            with new_folder(self.best_folder(state.best.step), {}) as new:
                write_bytes(new.path / WEIGHTS, save(origin.load_best(state.best.step)))
        self.save(state)

    def _remove_leftovers(self) -> None:
        """Remove partial folders and lock files of a killed training.

        The caller's lock on the folder covers them.
        """
        leftovers = [*self.folder.glob(".*.partial/"), *self.folder.glob(".*.lock")]
        for leftover in leftovers:
            with disk_errors(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _read(self, folder: Path, state: TrainState) -> "_Saved":
        """A checkpoint of the training that `state` belongs to, checked in full. Raises IntegrityError."""
        verify(folder)
        path = folder / _STATE
        try:
            content = read_json(path, SavedState, _MAX_STATE_BYTES)
            path = folder / _JOURNAL
            journal = [_entry(line) for line in path.read_bytes().splitlines()]
            path = folder / _TENSORS
            tensors = load(path.read_bytes())
            path = folder
            _check_content(content, journal, folder.name)
            _check_tensors(tensors, state)
        except (OSError, ValueError, SafetensorError) as error:
            raise IntegrityError(
                f"{path}: not what a training saves: {first_line(error):.200}; remove it"
            ) from error
        if content.best_step is not None:
            self._check_best(content.best_step, state.model)
        return _Saved(content, journal, tensors)

    def _check_best(self, step: int, model: GPT) -> None:
        """Raises IntegrityError unless the best weights are there and fit the model."""
        folder = self.best_folder(step)
        verify(folder)
        try:
            saved = {
                name: (tensor.dtype, tensor.shape) for name, tensor in read_header(folder / WEIGHTS).items()
            }
        except (OSError, ValueError, SafetensorError) as error:
            raise IntegrityError(
                f"{folder}: unreadable weights: {first_line(error):.200}; remove it"
            ) from error
        if saved != {name: ("F32", tuple(p.shape)) for name, p in model.named_parameters()}:
            raise IntegrityError(f"{folder}: weights of another model; remove it")

    def save_best(self, model: GPT, step: int) -> None:
        """Keep the current weights as the best ones, validated at `step`."""
        with new_folder(self.best_folder(step), {}) as new:
            # Tied ones once.
            weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
            write_bytes(new.path / WEIGHTS, save(weights))
        verify(self.best_folder(step))

    def load_best(self, step: int) -> dict[str, Tensor]:
        """Weights of the best model, by parameter name. Raises IntegrityError."""
        folder = self.best_folder(step)
        verify(folder)
        try:
            return load((folder / WEIGHTS).read_bytes())
        except (OSError, SafetensorError) as error:
            raise IntegrityError(
                f"{folder}: unreadable weights: {first_line(error):.200}; train again"
            ) from error

    def best_folder(self, step: int) -> Path:
        """The folder of the weights that were the best ones and were validated at `step`."""
        return self.folder / f"best-{step:08d}"

    def _drop_old(self) -> None:
        steps = checkpoints_in(self.folder)
        for old in steps[:-_N_KEPT]:
            _discard(old)
        try:
            kept = [
                read_json(step / _STATE, SavedState, _MAX_STATE_BYTES)
                for step in [*steps[-_N_KEPT:], *kept_in(self.folder)]
            ]
        except (OSError, ValueError):  # damaged since it was written: a resume will fall back, and remove it
            return
        needed = {self.best_folder(content.best_step) for content in kept if content.best_step is not None}
        for best in sorted(self.folder.glob("best-*")):
            if best not in needed:
                _discard(best)

    def _check_environment(self, content: "SavedState", allow_inexact: bool) -> None:
        """Raises ResourceError in another environment.

        With `allow_inexact`, records the differences instead.
        """
        different = environment_changes(content.environment, self.environment)
        if different and not allow_inexact:
            raise ResourceError(
                f"{self.folder}: cannot resume bit for bit here: {'; '.join(different)}. "
                "Set GPTPIPE_ALLOW_INEXACT=1 to resume anyway, or remove the folder to train from the start"
            )
        self.inexact = [*content.inexact]
        if different:
            complain(f"warning: resuming in another environment, not bit for bit: {'; '.join(different)}")
            self.inexact.append(f"after step {content.step}: {', '.join(different)}")

    def _note_changes(self, content: "SavedState") -> None:
        """Record which settings are not those of the checkpoint. The caller has decided that it may be used."""
        self.changed_now = {}
        if content.settings and self.settings:
            self.changed_now = changed_settings(content.settings, self.settings)
        self.changes = [
            *content.changes,
            *(f"after step {content.step}: {text}" for text in self.changed_now.values()),
        ]


def environment_changes(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """What differs between two results of `Runtime.describe`, as `key was ..., is ...`."""
    return [
        f"{key} was {saved.get(key)}, is {present.get(key)}"
        for key in sorted(saved.keys() | present.keys())
        if saved.get(key) != present.get(key)
    ]


class SavedState(BaseModel):
    """Content of state.json. Unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    step: _Step
    run_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    best_step: _Step | None
    history: list[Validation]
    skipped: _Step
    micro_batch_size: Annotated[int, Field(ge=1, lt=2**40)]
    environment: dict[str, str | int | bool]
    samples: list[Sample] = []  # an earlier version did not save them
    inexact: list[str] = []  # an earlier version did not save it
    settings: Settings | None = None  # the same
    changes: list[str] = []


def read_state(checkpoint: Path) -> SavedState:
    """The content of state.json in a checkpoint's folder, without checking the rest. Raises IntegrityError."""
    path = checkpoint / _STATE
    try:
        return read_json(path, SavedState, _MAX_STATE_BYTES)
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path}: not what a training saves: {first_line(error):.200}; remove it"
        ) from error


@dataclass(frozen=True)
class _Saved:
    """A checkpoint in memory that has been checked."""

    content: SavedState
    journal: list[Entry]
    tensors: dict[str, Tensor]

    def copy_to(self, state: TrainState) -> None:
        _load_tensors(state, self.tensors)
        state.step, state.skipped = self.content.step, self.content.skipped
        state.micro_batch_size = self.content.micro_batch_size
        state.history, state.samples = [*self.content.history], [*self.content.samples]
        state.journal = [*self.journal]
        state.steps = [
            (m["train/loss"], m["train/grad_norm"]) for _, _, m in state.journal if "train/loss" in m
        ]


def _entry(line: bytes) -> Entry:
    """A line of the journal. Raises ValueError."""
    try:
        return _ENTRY.validate_json(line, strict=True)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from error


def _check_content(content: SavedState, journal: list[Entry], name: str) -> None:
    """Raises ValueError unless the parts of a checkpoint agree with each other and with its folder's name."""
    if not name.endswith(f"-{content.step:08d}"):
        raise ValueError(f"{_STATE} is of step {content.step}, not of the step in the folder's name")
    validated = [validation.step for validation in content.history]
    losses = [(validation.step, validation.val_loss) for validation in content.history]
    if any(later <= earlier for earlier, later in pairwise([-1, *validated])) or content.step < max(
        validated, default=0
    ):
        raise ValueError("its validations are out of order")
    best = min(content.history, key=lambda validation: validation.val_loss, default=None)
    if content.best_step != (best.step if best else None):
        raise ValueError(f"best_step is {content.best_step}, which is not the validation with the lowest loss")
    if losses != [(step, metrics["val/loss"]) for step, _, metrics in journal if "val/loss" in metrics]:
        raise ValueError(f"{_JOURNAL} has other validations")
    if any(not metrics.keys() >= _VALIDATION_KEYS for _, _, metrics in journal if "val/loss" in metrics):
        raise ValueError(f"{_JOURNAL} lacks metrics of a validation")
    if any(not metrics.keys() >= _STEP_METRICS for _, _, metrics in journal if "train/loss" in metrics):
        raise ValueError(f"{_JOURNAL} lacks metrics of a step")
    if any(not 0 <= step <= content.step for step, _, _ in journal):
        raise ValueError(f"{_JOURNAL} has steps beyond {content.step}")


def _check_tensors(tensors: dict[str, Tensor], state: TrainState) -> None:
    """Raises ValueError unless names, shapes and types of the tensors are those that `_tensors` makes."""
    optimizers = {
        parameter: optimizer
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    wanted: dict[str, tuple[torch.Size, torch.dtype]] = {}
    # Nothing before the first step.
    has_optimizer_state = any(name.startswith("optimizer.") for name in tensors)
    for name, parameter in state.model.named_parameters():
        wanted[f"model.{name}"] = (parameter.shape, parameter.dtype)
        if has_optimizer_state:
            for key in _OPTIMIZER_TENSORS[type(optimizers[parameter])]:
                shape = torch.Size() if key == "step" else parameter.shape
                wanted[f"optimizer.{name}.{key}"] = (shape, parameter.dtype)
    generators = {"generator.cpu": torch.get_rng_state()}
    if "generator.cuda" in tensors and torch.cuda.is_available():
        generators["generator.cuda"] = torch.cuda.get_rng_state()
    wanted |= {name: (generator.shape, generator.dtype) for name, generator in generators.items()}
    for name in sorted(wanted.keys() | (tensors.keys() - {"generator.cuda"})):
        if name not in tensors:
            raise ValueError(f"{_TENSORS} lacks {name}")
        if name not in wanted:
            raise ValueError(f"{_TENSORS} has {name!r:.100}, which is unknown")
        shape, dtype = tensors[name].shape, tensors[name].dtype
        if (shape, dtype) != wanted[name]:
            raise ValueError(f"{_TENSORS}: {name} is {dtype} of shape {tuple(shape)}")
    try:
        torch.Generator().set_state(tensors["generator.cpu"])
    except RuntimeError as error:
        raise ValueError(f"{_TENSORS}: generator.cpu is not a valid generator state") from error


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _discard(folder: Path) -> None:
    """Remove a folder. If this is interrupted, nothing is left under the folder's name."""
    doomed = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder):
        folder.rename(doomed)
        sync_folder(doomed.parent)
        shutil.rmtree(doomed)


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Weights, optimizer state by parameter name, and torch's generators (training draws from no others)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        tensors[f"model.{name}"] = gather(parameter.detach()).cpu()
        for optimizer in state.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = gather(value).cpu()
    tensors["generator.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["generator.cuda"] = torch.cuda.get_rng_state()
    return tensors


@torch.no_grad()
def _load_tensors(state: TrainState, tensors: dict[str, Tensor]) -> None:
    groups = [(optimizer, group) for optimizer in state.optimizers for group in optimizer.param_groups]
    updates = {parameter: optimizer for optimizer, group in groups for parameter in group["params"]}
    for name, parameter in state.model.named_parameters():
        parameter.copy_(shard_like(tensors[f"model.{name}"], parameter))
        prefix = f"optimizer.{name}."
        saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        updates[parameter].state[parameter] = {
            key: shard_like(value, parameter) for key, value in saved.items()
        }
    torch.set_rng_state(tensors["generator.cpu"])
    if "generator.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["generator.cuda"])

"""Resumable training state on disk, in `.gptpipe/checkpoints/<key>/`, outside DVC.

    run.json                 the name of the training's run in the tracking store, chosen before the first step
    best-00000400/           weights of the best model so far, by validation loss
    step-00000500/           state.safetensors (weights, optimizer, generators), journal.jsonl (every logged metric,
                             with its step and time) and state.json (everything else)
    finished.json            the training is finished; see finished.py

Every folder has a manifest and is checked before use; nothing is pickled. Two steps are kept, and the older one is
removed only after the newer one has been read back. A folder appears and disappears under its name in one operation.
"""

import hashlib
import json
import shutil
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gptpipe.console import complain
from gptpipe.environment import place
from gptpipe.errors import IntegrityError, ResourceError
from gptpipe.files import disk_errors, new_folder, seal, to_json, unseal, verify, write_bytes, write_json
from gptpipe.model.device import shard_like, whole
from gptpipe.model.gpt import GPT
from gptpipe.model.layout import WEIGHTS
from gptpipe.training.loop import TrainState
from gptpipe.training.red_flags import Validation

_KEPT = 2
_STATE, _TENSORS, _JOURNAL, _RUN = "state.json", "state.safetensors", "journal.jsonl", "run.json"


def run_key(determinants: dict[str, Any]) -> str:
    """Name of the checkpoint folder: a digest of all that determines the run."""
    return hashlib.sha256(to_json(determinants)).hexdigest()[:16]


class Checkpoints:
    """Saves and restores the state of one training in a folder that the caller has locked."""

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.folder, self.environment = folder, environment
        self.inexact: list[str] = []  # where the training went on in another environment, and what differed

    def run_name(self) -> str:
        """What this training calls its run: the same name after a kill, also before the first checkpoint."""
        path = self.folder / _RUN
        with suppress(OSError, ValueError, KeyError):  # no training yet, or damaged
            return str(unseal(path.read_bytes())["name"])
        name = uuid.uuid4().hex
        write_bytes(path, seal({"name": name}))
        return name

    def save(self, state: TrainState, notes: dict[str, Any]) -> None:
        """Make the state durable, then drop what is no longer needed. All ranks must call, and rank 0 writes."""
        target, tensors = self.folder / f"step-{state.step:08d}", _tensors(state)
        if place().rank > 0:
            return
        with new_folder(target, {}) as new:
            write_bytes(new.path / _TENSORS, save(tensors))
            write_bytes(new.path / _JOURNAL, "".join(json.dumps(entry) + "\n" for entry in state.journal).encode())
            content = {
                "step": state.step,
                "best_step": state.best.step if state.best else None,
                "history": [asdict(validation) for validation in state.history],
                "skipped": state.skipped,
                "micro_batch_size": state.micro_batch_size,
                "environment": self.environment,
                "inexact": self.inexact,
                "notes": notes,
            }
            write_json(new.path / _STATE, content)
        verify(target)
        self._drop_old()

    def restore(self, state: TrainState, *, allow_inexact: bool) -> dict[str, Any] | None:
        """Load the newest sound checkpoint into `state` and return its notes; None where there never was one.

        Falls back to the one before with a warning. Raises IntegrityError where none is sound, ResourceError where
        this environment could not go on bit for bit, unless `allow_inexact`.
        """
        for left_by_a_kill in self.folder.glob(".*.partial/") if place().rank == 0 else ():
            with disk_errors(left_by_a_kill):
                shutil.rmtree(left_by_a_kill)
        for free_lock in self.folder.glob(".*.lock") if place().rank == 0 else ():  # this training holds the folder's
            with disk_errors(free_lock):
                free_lock.unlink()
        candidates = sorted(self.folder.glob("step-*"), reverse=True)
        for i, candidate in enumerate(candidates):
            try:
                verify(candidate)
                content = json.loads((candidate / _STATE).read_bytes())
                journal = [*map(json.loads, (candidate / _JOURNAL).read_bytes().splitlines())]
                if content["best_step"] is not None:
                    verify(self._best_folder(content["best_step"]))
                tensors = load((candidate / _TENSORS).read_bytes())
            except (IntegrityError, ValueError, SafetensorError) as error:  # the last two of what no training wrote
                what = error.args[0].split(";")[0] if isinstance(error, IntegrityError) else f"{candidate}: unreadable"
                complain(f"warning: {what}; trying the checkpoint before")
                continue
            self.inexact = content.get("inexact", [])  # a version before did not know
            self._check_environment(content["environment"], content["step"], allow_inexact)
            _load_tensors(state, tensors)
            state.step = content["step"]
            state.history = [Validation(**validation) for validation in content["history"]]
            state.skipped, state.micro_batch_size = content["skipped"], content["micro_batch_size"]
            state.journal = [(step, time_ms, metrics) for step, time_ms, metrics in journal]
            state.steps = [(m["train/loss"], m["train/grad_norm"]) for _, _, m in state.journal if "train/loss" in m]
            for unsound in candidates[:i] if place().rank == 0 else ():
                _discard(unsound)
            notes: dict[str, Any] = content["notes"]
            return notes
        if candidates:
            raise IntegrityError(f"{self.folder}: no checkpoint is sound; remove the folder to train from the start")
        return None

    def save_best(self, model: GPT, step: int) -> None:
        """Keep the present weights as the best ones, validated at `step`."""
        with new_folder(self._best_folder(step), {}) as new:
            weights = {name: parameter.detach() for name, parameter in model.named_parameters()}  # tied ones once
            write_bytes(new.path / WEIGHTS, save(weights))
        verify(self._best_folder(step))

    def load_best(self, step: int) -> dict[str, Tensor]:
        """Weights of the best model by our parameter names. Raises IntegrityError."""
        folder = self._best_folder(step)
        verify(folder)
        return load((folder / WEIGHTS).read_bytes())

    def _best_folder(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def _drop_old(self) -> None:
        steps = sorted(self.folder.glob("step-*"))
        for old in steps[:-_KEPT]:
            _discard(old)
        best_steps = {json.loads((kept / _STATE).read_bytes())["best_step"] for kept in steps[-_KEPT:]}
        needed = {self._best_folder(step) for step in best_steps if step is not None}
        for best in sorted(self.folder.glob("best-*")):
            if best not in needed:
                _discard(best)

    def _check_environment(self, saved: dict[str, Any], step: int, allow_inexact: bool) -> None:
        different = [f"{key} was {saved.get(key)}, is {self.environment.get(key)}"
                     for key in sorted(saved.keys() | self.environment.keys())
                     if saved.get(key) != self.environment.get(key)]  # fmt: skip
        if not different:
            return
        if allow_inexact:
            complain(f"warning: resuming in another environment, not bit for bit: {'; '.join(different)}")
            self.inexact.append(f"after step {step}: {', '.join(different)}")
            return
        raise ResourceError(
            f"{self.folder}: cannot resume bit for bit here: {'; '.join(different)}. Set GPTPIPE_ALLOW_INEXACT=1 to go "
            "on all the same, or remove the folder to train from the start"
        )


def _discard(folder: Path) -> None:
    """Remove a folder; killed in between, it is gone under its name all the same."""
    doomed = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder):
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Weights, optimizer state by parameter name, and torch's generators (the only ones that training draws from)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        tensors[f"model.{name}"] = whole(parameter.detach()).cpu()
        for optimizer in state.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = whole(value).cpu()
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
        updates[parameter].state[parameter] = {key: shard_like(value, parameter) for key, value in saved.items()}
    torch.set_rng_state(tensors["generator.cpu"])
    if "generator.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["generator.cuda"])

"""Stage train as one function: everything around the loop, from the verified split to the finished model folder."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from gptpipe.config import Params
from gptpipe.console import Progress, complain, say
from gptpipe.environment import allow_inexact, project_root
from gptpipe.errors import ConfigError, InputError, Interrupted
from gptpipe.evaluation.continuations import continue_text
from gptpipe.evaluation.metrics import Figures, figures
from gptpipe.evaluation.scoring import score
from gptpipe.files import Manifest, sha256_of, verify, write_json
from gptpipe.model.generate import Sampling
from gptpipe.model.gpt import GPT
from gptpipe.model.layout import initialise_from, weight_files
from gptpipe.model.optim import build_optimizers
from gptpipe.tokens.batches import Batches
from gptpipe.tokens.huggingface import byte_letters
from gptpipe.tokens.streams import Stream, open_stream
from gptpipe.tokens.tokenizer import TOKENIZER, Tokenizer
from gptpipe.training import runtime
from gptpipe.training.checkpoint import Checkpoints, locked, run_key
from gptpipe.training.loop import Entry, Metrics, Plan, TrainState, train
from gptpipe.training.red_flags import red_flags
from gptpipe.training.results import note_samples, summarise, write_curves, write_model

_VALIDATION_FIGURES = ("loss", "perplexity", "bits_per_byte", "token_accuracy")


class Record(Protocol):
    """Where a training is written down; the tracking store, or nothing."""

    @property
    def run_id(self) -> str | None: ...
    def metrics(self, entries: list[Entry]) -> None: ...
    def text(self, name: str, content: str) -> None: ...
    def tags(self, tags: dict[str, str]) -> None: ...


# Opens the record of a run: its id if it is resumed, what it is made from, what it runs on.
OpenRecord = Callable[[str | None, Manifest, dict[str, Any]], AbstractContextManager[Record]]


def train_model(params: Params, source: Path, target: Path, reports: Path, open_record: OpenRecord) -> Figures:
    """Train a model on the split in `source`; write it to `target`, its curves to `reports`.

    Continues where a stopped training of the same parameters and data left off. Returns the best validation figures.
    Raises Interrupted after a signal, the state saved; and whatever the rooms below raise.
    """
    section = params.train
    runtime.be_deterministic()
    runtime.keep_freed_memory()
    where = runtime.resolve(section)
    made_from = verify(source)
    tokenizer = Tokenizer.load(source / TOKENIZER)
    train_stream, val_stream = open_stream(source, "train"), open_stream(source, "val")
    if len(val_stream.tokens) < 2:
        raise InputError("train: the validation split is empty; raise split.val_fraction or add documents")
    batches = Batches(
        train_stream.tokens,
        context_length=params.model.context_length,
        stride=section.stride,
        batch_size=section.batch_size,
        seed=params.seed,
    )
    n_steps = section.n_steps(batches.n_windows)
    if section.warmup_steps >= n_steps:
        raise ConfigError(
            f"train.warmup_steps {section.warmup_steps} must be below the {n_steps} steps of train.epochs"
        )
    state, initial = _new_state(params, tokenizer, where.device)
    model = state.model
    say(
        f"train: {model.n_parameters():,} parameters, {len(train_stream.tokens):,} tokens, {n_steps:,} steps of "
        f"{section.batch_size} x {params.model.context_length} tokens "
        f"({n_steps * section.batch_size / batches.n_windows:.1f} epochs), on {where.device}"
    )
    determinants = {
        "seed": params.seed,
        "model": params.model.model_dump(),
        "train": section.model_dump(),
        "split": made_from.digest,
        "init_from": initial,
    }
    folder = project_root() / ".gptpipe" / "checkpoints" / run_key(determinants)
    with locked(folder):
        checkpoints = Checkpoints(folder, where.describe())
        notes = checkpoints.restore(state, allow_inexact=allow_inexact()) or {}
        if notes:
            say(f"train: resumed after step {state.step:,}")
        # On resume as before, whatever memory is free by now: it decides how sums are rounded.
        micro_batch = notes.get("micro_batch_size") or runtime.micro_batch_size(
            section, model, runtime.free_bytes(where.device)
        )
        loss = torch.compile(model.loss, dynamic=False) if where.compiles else model.loss
        plan = Plan(section, n_steps, micro_batch, params.seed, where.precision, loss)
        environment = {**where.describe(), "micro_batch_size": micro_batch}
        with open_record(notes.get("run_id"), made_from, environment) as record:
            with (
                runtime.StopRequest() as stop,
                Progress("train", unit="steps", total=n_steps, done=state.step) as progress,
            ):
                training = _Training(params, plan, state, val_stream, tokenizer, checkpoints, record, progress, stop)
                training.run(batches)
            summary = summarise(params, state, n_steps)
            write_model(target, params, tokenizer, checkpoints, summary, made_from)
            write_curves(reports, state, summary, checkpoints)
            write_json(reports / "mlflow_run.json", {"run_id": record.run_id})
            record.tags({"best_step": str(summary["best_step"])})
        checkpoints.remove()
    best: Figures = summary["val"]
    return best


def _new_state(params: Params, tokenizer: Tokenizer, device: torch.device) -> tuple[TrainState, dict[str, str]]:
    """The state before the first step, and the digests of the weights that it starts from, if it does from any."""
    torch.manual_seed(params.seed)
    model = GPT(params.model, tokenizer.vocab_size)
    model.activation_checkpointing = params.train.activation_checkpointing
    digests: dict[str, str] = {}
    if params.train.init_from is not None:
        folder = Path(params.train.init_from)
        initialise_from(model, folder)
        _check_tokenizer(tokenizer, folder)
        digests = {path.name: sha256_of(path) for path in weight_files(folder)}
    model.to(device)
    return TrainState(model, build_optimizers(model, params.train)), digests


def _check_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Weights learned for other tokens would load, and be worthless. Raises ConfigError."""
    path = folder / "tokenizer.json"
    if not path.exists():
        complain(f"warning: {folder} holds no tokenizer.json; see that its weights are for the tokens of this split")
        return
    letters = byte_letters()
    try:
        theirs = dict(json.loads(path.read_bytes())["model"]["vocab"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a tokenizer; fetch the model again") from error
    if any(theirs.get("".join(map(letters.__getitem__, token))) != i for token, i in tokenizer.ranks.items()):
        raise ConfigError(
            f"train.init_from {folder}: its tokens are not those of this split; set tokenize.encoding to its"
        )


@dataclass
class _Training:
    """One training under way: what the loop calls out to."""

    params: Params
    plan: Plan
    state: TrainState
    val_stream: Stream
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    record: Record
    progress: Progress
    stop: runtime.StopRequest
    _n_sent: int = 0  # entries of the journal that went to the record
    _flags_said: set[str] = field(default_factory=set)

    def run(self, batches: Batches) -> None:
        """Train to the end. Raises Interrupted after a signal, the state saved."""
        try:
            train(
                self.state,
                batches,
                self.plan,
                validate=self.validate,
                report=self.report,
                save=self.save,
                log=self.log,
                check_stop=self.stop.check,
            )
        except Interrupted:
            self.save()
            raise
        self._send()

    def validate(self) -> float:
        scores = score(
            self.state.model, self.val_stream, precision=self.plan.precision, advance=lambda _: self.stop.check()
        )
        found = figures(scores, self.val_stream.documents)
        self.log(self.state.step, {f"val/{name}": found[name] for name in _VALIDATION_FIGURES})
        return found["loss"]

    def report(self) -> None:
        """After each validation: keep the best weights, say what is seen, sample, send."""
        validation = self.state.history[-1]
        if self.state.best_is_now:
            self.checkpoints.save_best(self.state.model, self.state.step)
        train_loss = "" if validation.train_loss is None else f"train loss {validation.train_loss:.4f}, "
        mark = ", best so far" if self.state.best_is_now else ""
        say(f"train: step {validation.step:,}: {train_loss}val loss {validation.val_loss:.4f}{mark}")
        flags = red_flags(self.state.history, self.plan.n_steps)
        for name in sorted(flags.keys() - self._flags_said):
            complain(f"red flag: {flags[name]}")
        self._flags_said |= flags.keys()
        self.record.tags({f"red_flag.{name}": words for name, words in flags.items()})
        self.record.text("samples.json", note_samples(self.checkpoints.folder, self.state.step, self._samples()))
        self._send()

    def save(self) -> None:
        notes = {"run_id": self.record.run_id, "micro_batch_size": self.plan.micro_batch_size}
        self.checkpoints.save(self.state, notes)
        self._send()

    def log(self, step: int, metrics: Metrics) -> None:
        self.state.journal.append((step, time.time_ns() // 1_000_000, metrics))
        if "train/loss" in metrics:
            speed = f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
            self.progress.advance(note=f"loss {metrics['train/loss']:.3f}  {speed}")

    def _send(self) -> None:
        self.record.metrics(self.state.journal[self._n_sent :])
        self._n_sent = len(self.state.journal)

    def _samples(self) -> dict[str, str]:
        """Continuations of the sample prompts; the same seed each time, so that they compare."""
        section = self.params.train
        sampling = Sampling(temperature=0.8, top_k=50, seed=self.params.seed)
        return {
            prompt: "".join(continue_text(self.state.model, self.tokenizer, prompt, section.sample_tokens, sampling))
            for prompt in section.sample_prompts
        }

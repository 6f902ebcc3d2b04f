"""Stage train as one function: everything around the loop, from the verified split to the finished model folder."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic_core import from_json

from gptpipe.base.files import Manifest, read_bytes, sha256_of, write_json
from gptpipe.base.finished import discard, finished_in, mark_finished
from gptpipe.formats.tokenizer import Tokenizer, byte_letters
from gptpipe.model.device import is_out_of_memory
from gptpipe.model.generate import Sampling
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import initialise_from, weight_files
from gptpipe.score.continuations import continue_text
from gptpipe.score.metrics import compute_metrics
from gptpipe.score.scoring import score
from gptpipe.shell.console import Progress, complain, say
from gptpipe.shell.environment import allow_inexact, place, project_root
from gptpipe.shell.errors import ConfigError, InputError, Interrupted, NumericError, ResourceError, first_line
from gptpipe.shell.locks import one_writer
from gptpipe.train import distributed, runtime
from gptpipe.train.checkpoint import Checkpoints, run_key
from gptpipe.train.inputs import Start, start
from gptpipe.train.loop import Plan, train
from gptpipe.train.optim import build_optimizers
from gptpipe.train.params import RunParams
from gptpipe.train.red_flags import red_flags
from gptpipe.train.results import samples_table, summarise, write_model, write_reports
from gptpipe.train.state import VALIDATION_METRICS, Entry, Metrics, TrainState

_ROLL_BACKS = 3  # to one checkpoint; more would not help
_MAX_TOKENIZER_BYTES = 1 << 27  # of a tokenizer.json; that of Llama 3 has 9 MB
_COURSE = 40  # steps whose losses are drawn on a terminal


class Record(Protocol):
    """Where a training is written down; the tracking store, or nothing."""

    @property
    def run_id(self) -> str | None: ...
    def metrics(self, entries: list[Entry]) -> None: ...
    def text(self, name: str, content: str) -> None: ...
    def tags(self, tags: dict[str, str]) -> None: ...


# Opens the record of a run: its id if it is resumed, what it is made from, what it runs on.
OpenRecord = Callable[[str | None, Manifest, dict[str, Any]], AbstractContextManager[Record]]


@distributed.together()
def train_model(params: RunParams, source: Path, target: Path, reports: Path, open_record: OpenRecord) -> Metrics:
    """Train a model on the split in `source`; write it to `target`, its curves to `reports`.

    Continues a stopped training of the same parameters and data. Of a finished one it only writes the results again.
    Returns the best validation metrics. Under torchrun, every rank calls it and rank 0 writes. Raises Interrupted after
    a signal, with the state saved, and what the called modules raise.
    """
    section, share = params.train, distributed.share(params.train)
    begin = start(params, source)
    where, n_steps = begin.where, begin.n_steps
    state, initial = _new_state(params, begin.tokenizer, where)
    model = state.model
    n_epochs = n_steps * section.batch_size / begin.batches.n_windows
    say(
        f"train: {model.n_parameters():,} parameters, {len(begin.train.tokens):,} tokens, {n_steps:,} steps of "
        f"{section.batch_size} x {params.model.context_length} tokens ({n_epochs:.1f} epochs), on {where.device}"
        f"{', compiled' if where.compiles else ''}, processes: {where.ranks}"
    )
    determinants = params.model_dump(include={"seed", "model", "train"}, exclude={"train": {"launcher", "parallel"}})
    determinants |= {"split": begin.made_from.digest, "init_from": initial}
    folder = project_root() / ".gptpipe" / "checkpoints" / run_key(determinants)
    if place().rank == 0 and finished_in(folder).get("environment", where.describe()) != where.describe():
        discard(folder)  # finished elsewhere or by other code: it cannot say what this training would give
    distributed.from_first(None)  # the other ranks look at the folder only now
    with one_writer(folder) if place().rank == 0 else nullcontext():
        checkpoints = Checkpoints(folder, where.describe())
        notes = checkpoints.restore(state, allow_inexact=allow_inexact()) or {}
        if distributed.from_first((folder.name, state.step)) != (folder.name, state.step):
            raise ResourceError(f"{folder}: rank {place().rank} sees other content than rank 0; share the folder")
        if finished_in(folder):
            say(f"train: finished before, after step {state.step:,}; writing its results again")
        elif notes:
            say(f"train: resumed after step {state.step:,}")
        n_own = share.stop - share.start
        with _told_of_memory(state):
            loss = runtime.loss_function(model, section, begin.tokenizer.end_of_text, compiles=where.compiles)
            loss = distributed.averaging(model, loss)
            # On resume as before, whatever memory is free by now: it decides how sums are rounded.
            if not notes or n_own % state.micro_batch_size:  # or the number of ranks is another
                own = section.model_copy(update={"batch_size": n_own})
                free, holds_all_logits = runtime.free_bytes(where.device), where.holds_all_logits
                fitting = runtime.micro_batch_size(own, model, free, holds_all_logits=holds_all_logits)
                size = int(distributed.all_reduce(torch.tensor(fitting), torch.distributed.ReduceOp.MIN))
                n_spare = 0 if state.step else 8 * model.n_parameters()  # for what the optimizer will hold
                size = distributed.fitting_all(model, loss, where.precision, size, n_own=n_own, n_spare=n_spare)
                state.micro_batch_size = size
            distributed.settle(model, loss, where.precision, state.micro_batch_size)
        plan = Plan(section, n_steps, params.seed, where.precision, loss)
        environment = {**where.describe(), "micro_batch_size": state.micro_batch_size}
        opened: Any = nullcontext()
        if place().rank == 0:
            opened = open_record(notes.get("run_id") or checkpoints.run_name(), begin.made_from, environment)
        with opened as record:
            if checkpoints.inexact and place().rank == 0:
                record.tags({"resumed_inexactly": "; ".join(checkpoints.inexact)})
            with (
                runtime.noted_signals() as check_stop,
                Progress("train", unit="steps", total=n_steps, done=state.step) as progress,
            ):
                saved_step = state.step if notes else None
                training = _Training(params, plan, state, begin, checkpoints, record, progress, check_stop, saved_step)
                training.run()
            summary = summarise(params, state, n_steps, checkpoints.inexact)
            if place().rank == 0:
                run_id = record.run_id  # once: the store may answer in between, and give the run its own id
                digests = write_reports(reports, state, summary)
                write_model(target, params, begin, checkpoints, summary, digests)
                write_json(reports / "mlflow_run.json", {"run_id": run_id})
                record.tags({"best_step": str(summary["best_step"])})
        if place().rank == 0:
            mark_finished(folder, run_id, where.describe())
    best: Metrics = summary["val"]
    return best


@contextmanager
def _told_of_memory(state: TrainState) -> Iterator[None]:
    """Outside of a step's passes, where smaller micro-batches would not help: out of memory becomes ResourceError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"train: out of memory after step {state.step}; make memory free, or lower the model's size"
        ) from error


def _new_state(params: RunParams, tokenizer: Tokenizer, where: runtime.Runtime) -> tuple[TrainState, dict[str, str]]:
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
    model.to(where.device)
    if place().n_ranks > 1 and params.train.parallel == "fsdp":
        distributed.shard(model)
    return TrainState(model, build_optimizers(model, params.train), params.train.batch_size), digests


def _check_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Weights learned for other tokens would load, and be worthless. Raises ConfigError."""
    path = folder / "tokenizer.json"
    if not path.exists():
        complain(f"warning: {folder} holds no tokenizer.json; see that its weights are for the tokens of this split")
        return
    letters = byte_letters()
    try:
        theirs = from_json(read_bytes(path, _MAX_TOKENIZER_BYTES))["model"]["vocab"]
        if not isinstance(theirs, dict):
            raise TypeError("its vocabulary is not a table")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not a tokenizer: {first_line(error):.200}; fetch the model again") from error
    if any(theirs.get("".join(map(letters.__getitem__, token))) != i for token, i in tokenizer.ranks.items()):
        raise ConfigError(
            f"train.init_from {folder}: its tokens are not those of this split; set tokenize.encoding to its"
        )


@dataclass
class _Training:
    """One training under way: what the loop calls out to."""

    params: RunParams
    plan: Plan
    state: TrainState
    begin: Start
    checkpoints: Checkpoints
    record: Record
    progress: Progress
    check_stop: Callable[[], None]
    saved_step: int | None  # of the newest checkpoint
    _n_sent: int = 0  # entries of the journal that went to the record
    _flags_said: set[str] = field(default_factory=set)
    _rolled_back_to: list[int] = field(default_factory=list)

    def run(self) -> None:
        """Train to the end. Raises Interrupted after a signal, the state saved."""
        try:
            with _told_of_memory(self.state):
                train(
                    self.state,
                    self.begin.batches,
                    self.plan,
                    validate=self.validate,
                    report=self.report,
                    save=self.save,
                    roll_back=self.roll_back,
                    log=self.log,
                    check_stop=self.check_stop,
                )
        except Interrupted:
            self.save()
            raise
        if self.saved_step != self.state.step:  # patience ran out between two saves
            self.save()
        self._send()

    def validate(self) -> float:
        model, part = distributed.whole_model(self.state.model), place()[:2]
        scores = score(
            model, self.begin.val, precision=self.plan.precision, part=part, advance=lambda _: self.check_stop()
        )
        for sums in vars(scores).values():
            distributed.all_reduce(torch.from_numpy(sums))
        found = compute_metrics(scores.by_document, self.begin.val.documents)
        self.log(self.state.step, {f"val/{name}": found[name] for name in VALIDATION_METRICS})
        return distributed.from_first(found["loss"])

    def report(self) -> None:
        """After each validation: keep the best weights, say what is seen, sample, send."""
        validation, model = self.state.history[-1], distributed.whole_model(self.state.model)
        if place().rank > 0:
            return
        if self.state.best_is_now:
            self.checkpoints.save_best(model, self.state.step)
        train_loss = "" if validation.train_loss is None else f"train loss {validation.train_loss:.4f}, "
        mark = ", best so far" if self.state.best_is_now else ""
        say(f"train: step {validation.step:,}: {train_loss}val loss {validation.val_loss:.4f}{mark}")
        flags = red_flags(self.state.history, self.plan.n_steps)
        for name in sorted(flags.keys() - self._flags_said):
            complain(f"red flag: {flags[name]}")
        self._flags_said |= flags.keys()
        self.record.tags({f"red_flag.{name}": words for name, words in flags.items()})
        section, step = self.params.train, self.state.step
        sampling = Sampling(temperature=0.8, top_k=50, seed=self.params.seed)  # each time, so that they compare
        for prompt in section.sample_prompts:
            continuation = "".join(continue_text(model, self.begin.tokenizer, prompt, section.sample_tokens, sampling))
            self.state.samples.append((step, prompt, continuation))
            self.progress.sample = "".join(filter(str.isprintable, " ".join(f"{prompt}{continuation}".split())))
            say(f"train: step {step:,}: {prompt!r} goes on {continuation!r}", "verbose")
        self.record.text("samples.json", samples_table(self.state.samples).decode())
        if section.on_spike == "stop":  # else only what is never taken back: what is saved
            self._send()

    def save(self) -> None:
        self.checkpoints.save(self.state, {"run_id": getattr(self.record, "run_id", None)})
        self.saved_step = self.state.step
        self._send()

    def roll_back(self, error: NumericError) -> None:
        """Back to the last checkpoint, which passes over what failed; not for ever. Raises the error."""
        failed = self.state.step + 1
        self.checkpoints.restore(self.state, allow_inexact=allow_inexact())
        self._rolled_back_to.append(self.state.step)
        if self._rolled_back_to.count(self.state.step) > _ROLL_BACKS:
            raise error
        complain(f"warning: {str(error).split(';')[0]}; going on from step {self.state.step:,} with other batches")
        if place().rank == 0:
            self.record.tags({f"rolled_back.{failed:08d}": str(error)})

    def log(self, step: int, metrics: Metrics) -> None:
        self.state.journal.append((step, time.time_ns() // 1_000_000, metrics))
        if "train/loss" in metrics:
            speed = f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
            losses = [loss for loss, _ in self.state.steps[-_COURSE:]]
            self.progress.advance(note=f"loss {metrics['train/loss']:.3f}  {speed}", course=losses)
        say(f"train: step {step:,}: {', '.join(f'{key} {value:.6g}' for key, value in metrics.items())}", "verbose")

    def _send(self) -> None:
        if place().rank == 0:
            self.record.metrics(self.state.journal[self._n_sent :])
        self._n_sent = len(self.state.journal)

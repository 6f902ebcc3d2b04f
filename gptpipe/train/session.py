"""Stage train as one function: from the verified split to the finished model folder."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from gptpipe.base.files import sha256_of
from gptpipe.base.finished_training import discard, finished_in, mark_finished
from gptpipe.base.manifest import Manifest
from gptpipe.formats.hf_tokenizer import check_same_tokens
from gptpipe.model.device import memory_errors
from gptpipe.model.generate import Sampling
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import initialise_from, weight_files
from gptpipe.score.continuations import announce_cut
from gptpipe.score.metrics import VALIDATION_METRICS, Metrics, compute_metrics
from gptpipe.score.scoring import score, scoring_in_words
from gptpipe.score.text_batch import continue_text
from gptpipe.shell.console import Progress, complain, say
from gptpipe.shell.environment import allow_inexact, project_root, rank_info
from gptpipe.shell.errors import IntegrityError, Interrupted, NumericError, ResourceError
from gptpipe.shell.locks import one_writer
from gptpipe.train import distributed
from gptpipe.train.checkpoint import Checkpoints
from gptpipe.train.distributed import is_writer
from gptpipe.train.earlier_trainings import Present, advice, declared_state, kept_state, take_over
from gptpipe.train.inputs import Inputs, load_inputs
from gptpipe.train.loop import train
from gptpipe.train.memory import fitting_micro_batch_size, free_bytes
from gptpipe.train.optim import build_optimizers
from gptpipe.train.params import RunParams, TrainParams
from gptpipe.train.red_flags import final_red_flags, red_flags
from gptpipe.train.results import (
    samples_table,
    summarise,
    write_model,
    write_reports,
    write_run,
    write_state,
)
from gptpipe.train.runtime import loss_function
from gptpipe.train.schedule import steps_before_the_end_matters
from gptpipe.train.settings import settings_of
from gptpipe.train.signals import deferred_signals
from gptpipe.train.state import Entry, TrainState
from gptpipe.train.step import Plan

STATE = "state"  # name of the folders with the state that a longer training continues
_MAX_ROLL_BACKS = 3  # to the same checkpoint; a fourth attempt would probably fail too
_PLOTTED_STEPS = 40  # number of recent losses in the terminal's sparkline


class Record(Protocol):
    """Where a training is recorded: the tracking store, or nowhere."""

    @property
    def run_id(self) -> str | None: ...
    def metrics(self, entries: list[Entry]) -> None: ...
    def text(self, name: str, content: str) -> None: ...
    def tags(self, tags: dict[str, str]) -> None: ...


class NullRecord:
    """The record of every rank but the first."""

    run_id: str | None = None

    def metrics(self, entries: list[Entry]) -> None: ...
    def text(self, name: str, content: str) -> None: ...
    def tags(self, tags: dict[str, str]) -> None: ...


# Opens the record of a run. Arguments: the provisional run id, the manifest of the split, the environment, the
# number of parameters.
OpenRecord = Callable[[str, Manifest, dict[str, Any], int], AbstractContextManager[Record]]


@distributed.process_group()
def train_model(
    params: RunParams,
    split: Path,
    model_folder: Path,
    reports: Path,
    open_record: OpenRecord,
    start: Path | None = None,
) -> Metrics:
    """Train a model on `split`; write it to `model_folder`, its curves and summary to `reports`.

    `start` is the model folder that `train.init_from` names. The caller has put its shape into `params`.

    Continues a stopped training of the same parameters and data. If that training is finished, only writes the
    results again. Returns the metrics of the best validation. Under torchrun, every rank calls this function
    and rank 0 writes. Raises Interrupted after a signal, once the state is saved, and what the called modules
    raise.
    """
    distributed.batch_slice(params.train)  # fail early if the ranks cannot share a batch
    inputs = load_inputs(params, split)
    state, initial_weights = _new_state(params, inputs, start)
    say(_describe(params, inputs, state.model))
    settings = settings_of(params, inputs.split.digest, initial_weights, inputs.n_steps)
    folder = project_root() / ".gptpipe" / "checkpoints" / settings.key
    _discard_foreign_checkpoint(folder, inputs)
    with _only_training_in(folder):
        present = Present(folder, settings, inputs.runtime.describe(), allow_inexact())
        if is_writer():
            take_over(present)
        distributed.barrier()  # the other ranks look at the folder only now
        checkpoints = Checkpoints(folder, present.environment, settings)
        kept = project_root() / ".gptpipe" / STATE  # DVC has removed the output of the last training by now
        is_resumed = _resume(checkpoints, state) or _continue_other(checkpoints, state, present, kept)
        keeps_micro_batches = is_resumed and not _has_new_micro_batches(params, checkpoints)
        plan = _plan(params, inputs, state, keeps_micro_batches=keeps_micro_batches)
        previous_run = _choose_run(checkpoints, params)
        with _open_record(open_record, checkpoints, inputs, state) as record:
            if previous_run:
                record.tags({"continues_run": previous_run})
            record.tags({"scoring": scoring_in_words(inputs.scoring.describe())})
            _record_changes(record, checkpoints)
            training = _Training(params, inputs, plan, state, checkpoints, record)
            training.run(is_saved=is_resumed)
            summary = summarise(params, inputs, state, checkpoints)
            # Read only once: if the store answers during the next lines, the id changes, and the files would
            # disagree.
            run_id = record.run_id
            if is_writer():
                digests = write_reports(reports, state, summary)
                write_model(model_folder, params, inputs, checkpoints, summary, digests)
                write_state(model_folder.with_name(STATE), params, inputs.split, checkpoints)
                if _can_be_extended(params.train):
                    write_state(kept, params, inputs.split, checkpoints)
                write_run(reports, run_id, params, state)
            record.tags({"best_step": str(summary["best_step"])})
        if is_writer():
            mark_finished(folder, run_id, inputs.runtime.describe())
    best: Metrics = summary["val"]
    return best


def _record_changes(record: Record, checkpoints: Checkpoints) -> None:
    """Tag the run with what was different before some step."""
    notes = {"resumed_inexactly": checkpoints.inexact, "changed_settings": checkpoints.changes}
    for name, lines in notes.items():
        if lines:
            record.tags({name: "; ".join(lines)})


def _new_state(params: RunParams, inputs: Inputs, start: Path | None) -> tuple[TrainState, dict[str, str]]:
    """The state before the first step, and the SHA-256 of each weight file that it starts from."""
    torch.manual_seed(params.seed)
    model = GPT(params.model, inputs.tokenizer.vocab_size)
    model.activation_checkpointing = params.train.activation_checkpointing
    digests: dict[str, str] = {}
    if start is not None:
        check_same_tokens(inputs.tokenizer, start)  # first: another tokenizer usually has another size too
        initialise_from(model, start)
        digests = {path.name: sha256_of(path) for path in weight_files(start)}
        say(f"train: starts from {params.train.init_from}")
    model.to(inputs.runtime.device)
    if rank_info().n_ranks > 1 and params.train.parallel == "fsdp":
        distributed.shard(model)
    return TrainState(model, build_optimizers(model, params.train), params.train.batch_size), digests


def _describe(params: RunParams, inputs: Inputs, model: GPT) -> str:
    section, runtime = params.train, inputs.runtime
    n_epochs = inputs.n_steps * section.batch_size / inputs.batches.n_windows
    return (
        f"train: {model.n_parameters():,} parameters, {len(inputs.train.tokens):,} tokens, "
        f"{inputs.n_steps:,} steps of {section.batch_size} x {params.model.context_length} tokens "
        f"({n_epochs:.1f} epochs), on {runtime.device}{', compiled' if runtime.is_compiled else ''}, "
        f"processes: {runtime.ranks}"
    )


def _discard_foreign_checkpoint(folder: Path, inputs: Inputs) -> None:
    """Remove the checkpoint of a training that finished on another machine or with other code.

    Its results may differ from those of a training on this machine with this code.
    """
    environment = inputs.runtime.describe()
    if is_writer() and finished_in(folder).get("environment", environment) != environment:
        discard(folder)
    distributed.barrier()  # the other ranks look at the folder only now


@contextmanager
def _only_training_in(folder: Path) -> Iterator[None]:
    """Refuse a second training of the same run. Rank 0 holds the lock for all."""
    with one_writer(folder) if is_writer() else nullcontext():
        yield


def _resume(checkpoints: Checkpoints, state: TrainState) -> bool:
    """Restore the newest sound checkpoint; returns whether there was one.

    Raises what `Checkpoints.restore` raises.
    """
    is_resumed = checkpoints.restore(state, allow_inexact=allow_inexact())
    folder = checkpoints.folder
    if distributed.from_first((folder.name, state.step)) != (folder.name, state.step):
        raise ResourceError(
            f"{folder}: rank {rank_info().rank} sees other content than rank 0; "
            "put it on a file system that all machines share"
        )
    if finished_in(folder):
        say(f"train: already finished, after step {state.step:,}; writing its results again")
    elif is_resumed:
        say("; ".join([f"train: resumed after step {state.step:,}", *checkpoints.changed_now.values()]))
    return is_resumed


def _continue_other(checkpoints: Checkpoints, state: TrainState, present: Present, exported: Path) -> bool:
    """Continue the training that `train.continue_from` names, or extend a shorter one; returns whether it did.

    Otherwise, print which unfinished training could be named. Raises ConfigError and what
    `Checkpoints.continue_from` raises.
    """
    name = present.settings.train["continue_from"]
    source = (
        distributed.from_first(kept_state(present, exported)) if name is None else declared_state(present, name)
    )
    if source is None:
        if is_writer() and (suggestion := advice(present)):
            say(f"train: starts at step 0; {suggestion}", "quiet")
        return False
    try:
        checkpoints.continue_from(source.checkpoint, state)
    except IntegrityError as error:
        if name is not None:
            raise
        complain(f"warning: cannot extend a finished training: {str(error).split(';')[0]}; starting at step 0")
        return False
    say("; ".join([f"train: continues from {source}", *checkpoints.changed_now.values()]))
    return True


def _has_new_micro_batches(params: RunParams, checkpoints: Checkpoints) -> bool:
    """Whether the user has set another size of micro-batches since the restored checkpoint."""
    return "train.micro_batch_size" in checkpoints.changed_now and params.train.micro_batch_size is not None


def _plan(params: RunParams, inputs: Inputs, state: TrainState, *, keeps_micro_batches: bool) -> Plan:
    """Build the loss and choose the size of the micro-batches.

    Raises ResourceError if single sequences do not fit.
    """
    section, runtime, model = params.train, inputs.runtime, state.model
    with _memory_errors(state):
        loss = loss_function(model, section, inputs.tokenizer.end_of_text, is_compiled=runtime.is_compiled)
        loss = distributed.averaging(model, loss)
        own = distributed.batch_slice(section)
        n_own = own.stop - own.start
        # A resumed training keeps its micro-batch size even if more memory is free: the size affects rounding.
        if not keeps_micro_batches or n_own % state.micro_batch_size:  # or the number of ranks has changed
            size = fitting_micro_batch_size(
                section.model_copy(update={"batch_size": n_own}),
                model,
                free_bytes(runtime.device),
                holds_all_logits=runtime.holds_all_logits,
            )
            size = int(distributed.all_reduce(torch.tensor(size), torch.distributed.ReduceOp.MIN))
            n_spare = 0 if state.step else 8 * model.n_parameters()  # for the optimizer's state
            state.micro_batch_size = distributed.fitting_on_all_ranks(
                model, loss, runtime.precision, size, n_own=n_own, n_spare=n_spare
            )
        distributed.warm_up(model, loss, runtime.precision, state.micro_batch_size)
    keep_at = steps_before_the_end_matters(inputs.n_steps, section) if _can_be_extended(section) else None
    return Plan(section, inputs.n_steps, params.seed, runtime.precision, loss, keep_at)


def _can_be_extended(section: TrainParams) -> bool:
    """Whether the state is kept from which a longer training could continue."""
    return section.keep_state and section.schedule in ("wsd", "constant")


def _choose_run(checkpoints: Checkpoints, params: RunParams) -> str | None:
    """Choose the run of the record; returns the id of the run that a new one continues, if it does."""
    if not is_writer():
        return None
    is_finished = bool(finished_in(checkpoints.folder))
    previous = checkpoints.choose_run(params.train.on_spike, is_finished=is_finished)
    if previous and not is_finished:
        say(f"train: continues run {previous} in a new run, because roll-backs replace points that it has")
    return previous


def _open_record(
    open_record: OpenRecord, checkpoints: Checkpoints, inputs: Inputs, state: TrainState
) -> AbstractContextManager[Record]:
    """The record of this training; it records nothing on every rank but the first."""
    if not is_writer():
        return nullcontext(NullRecord())
    environment = {**inputs.runtime.describe(), "micro_batch_size": state.micro_batch_size}
    n_parameters = state.model.n_parameters()
    return open_record(checkpoints.provisional_run_id(), inputs.split, environment, n_parameters)


def _memory_errors(state: TrainState) -> AbstractContextManager[None]:
    """Report that memory ran out in a place where smaller micro-batches would not help."""
    return memory_errors(
        lambda: f"train: out of memory after step {state.step}; free memory, or lower the model's size"
    )


@dataclass
class _Training:
    """A training in progress: the `Events` of the loop."""

    params: RunParams
    inputs: Inputs
    plan: Plan
    state: TrainState
    checkpoints: Checkpoints
    record: Record
    _progress: Progress = field(init=False)
    _check_stop: Callable[[], None] = field(init=False)
    _saved_step: int | None = None  # of the newest checkpoint
    _n_saved: int = 0  # entries of the journal that the newest checkpoint has
    _n_sent: int = 0  # entries of the journal that the record has
    _printed_flags: set[str] = field(default_factory=set)
    _roll_backs: list[int] = field(default_factory=list)  # the step that each went back to

    def run(self, *, is_saved: bool) -> None:
        """Train to the end; `is_saved` says whether the state comes from a checkpoint.

        Raises Interrupted once the state is saved.
        """
        state = self.state
        self._saved_step = state.step if is_saved else None
        self._n_saved = len(state.journal)
        for i, prompt in enumerate(self.params.train.sample_prompts):
            announce_cut(state.model, self.inputs.tokenizer, prompt, f"train.sample_prompts[{i}]")
        progress = Progress("train", unit="steps", total=self.plan.n_steps, done=state.step)
        with deferred_signals() as self._check_stop, progress as self._progress:
            self._send()  # an earlier process may have been killed before it could
            try:
                with _memory_errors(state):
                    train(state, self.inputs.batches, self.plan, self)
                self._save_if_new()  # patience may run out between two saves
            except Interrupted:
                self._save_if_new()
                raise
            self._report_red_flags(final_red_flags(state.history, self.plan.n_steps))

    def _save_if_new(self) -> None:
        if self._saved_step != self.state.step:
            self.save()

    def check_stop(self) -> None:
        self._check_stop()

    def log(self, step: int, metrics: Metrics) -> None:
        self.state.journal.append((step, time.time_ns() // 1_000_000, metrics))
        self._send()
        if "train/loss" in metrics:
            speed = f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
            losses = [loss for loss, _ in self.state.steps[-_PLOTTED_STEPS:]]
            self._progress.advance(note=f"loss {metrics['train/loss']:.3f}  {speed}", course=losses)
        values = ", ".join(f"{key} {value:.6g}" for key, value in metrics.items())
        say(f"train: step {step:,}: {values}", "verbose")

    def validate(self) -> float:
        model = distributed.unsharded(self.state.model)
        scores = score(
            model,
            self.inputs.val,
            self.inputs.scoring,
            part=rank_info()[:2],
            advance=lambda _: self.check_stop(),
        )
        for sums in (scores.by_document, scores.by_confidence):
            distributed.all_reduce(torch.from_numpy(sums))
        metrics = compute_metrics(scores.by_document, self.inputs.val.documents)
        loss = distributed.from_first(metrics["loss"])
        if math.isfinite(loss):  # otherwise the loop stops; checkpoints and records have finite numbers only
            self.log(self.state.step, {f"val/{name}": metrics[name] for name in VALIDATION_METRICS})
        return loss

    def after_validation(self) -> None:
        """Keep the best weights, print the validation and its red flags, and sample."""
        model = distributed.unsharded(self.state.model)  # all ranks must call it
        if not is_writer():
            return
        if self.state.is_best:
            self.checkpoints.save_best(model, self.state.step)
        self._print_validation()
        self._report_red_flags(red_flags(self.state.history, self.plan.n_steps))
        self._sample(model)

    def _print_validation(self) -> None:
        validation = self.state.history[-1]
        train_loss = "" if validation.train_loss is None else f"train loss {validation.train_loss:.4f}, "
        mark = ", best so far" if self.state.is_best else ""
        say(f"train: step {validation.step:,}: {train_loss}val loss {validation.val_loss:.4f}{mark}")

    def _report_red_flags(self, flags: dict[str, str]) -> None:
        """Print the new flags. Make them the flags of the record, without those that no longer hold."""
        for name in sorted(flags.keys() - self._printed_flags):
            complain(f"red flag: {flags[name]}")
        # Also those that this training reported before it was resumed.
        earlier = self._printed_flags | red_flags(self.state.history[:-1], self.plan.n_steps).keys()
        self._printed_flags |= flags.keys()
        tags = {**dict.fromkeys(earlier, ""), **flags}
        self.record.tags({f"red_flag.{name}": message for name, message in tags.items()})

    def _sample(self, model: GPT) -> None:
        """Continue the sample prompts, with the same seed each time, so that the samples compare."""
        section, step = self.params.train, self.state.step
        sampling = Sampling(temperature=0.8, top_k=50, seed=self.params.seed)
        for prompt in section.sample_prompts:
            pieces = continue_text(model, self.inputs.tokenizer, prompt, section.sample_tokens, sampling)
            continuation = "".join(pieces)
            self.state.samples.append((step, prompt, continuation))
            one_line = " ".join(f"{prompt}{continuation}".split())
            self._progress.sample = "".join(filter(str.isprintable, one_line))
            say(f"train: step {step:,}: {prompt!r} continues {continuation!r}", "verbose")
        self.record.text("samples.json", samples_table(self.state.samples).decode())

    def save(self) -> None:
        self.checkpoints.save(self.state)
        self._saved_step = self.state.step
        self._n_saved = len(self.state.journal)
        self._send()

    def keep(self) -> None:
        self.checkpoints.keep(self.state)

    def roll_back(self, error: NumericError) -> None:
        failed_step = self.state.step + 1
        micro_batch_size = self.state.micro_batch_size
        self.checkpoints.restore(self.state, allow_inexact=allow_inexact())
        self._n_saved = len(self.state.journal)
        self.state.micro_batch_size = micro_batch_size  # the saved one may be of another number of ranks
        self._roll_backs.append(self.state.step)
        if self._roll_backs.count(self.state.step) > _MAX_ROLL_BACKS:
            raise error
        reason = str(error).split(";")[0]
        complain(f"warning: {reason}; continuing from step {self.state.step:,} with other batches")
        self.record.tags({f"rolled_back.{failed_step:08d}": str(error)})

    def _send(self) -> None:
        """Give the record the journal entries that it does not have yet. It returns at once.

        If the training may be rolled back, only those that are saved: the record never takes an entry back.
        """
        is_final = self.params.train.on_spike == "stop"
        n_sendable = len(self.state.journal) if is_final else self._n_saved
        self.record.metrics(self.state.journal[self._n_sent : n_sendable])
        self._n_sent = n_sendable

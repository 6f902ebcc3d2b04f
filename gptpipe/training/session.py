"""Stage train as one function: everything around the loop, from the verified split to the finished model folder."""

import io
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from gptpipe.config import Params
from gptpipe.console import Progress, complain, say
from gptpipe.environment import allow_inexact, project_root
from gptpipe.errors import InputError, Interrupted
from gptpipe.evaluation.continuations import continue_text
from gptpipe.evaluation.metrics import Figures, figures
from gptpipe.evaluation.scoring import score
from gptpipe.files import Manifest, new_folder, sha256_of, verify, write_bytes, write_json
from gptpipe.model.generate import Sampling
from gptpipe.model.gpt import GPT
from gptpipe.model.layout import WEIGHTS, initialise_from, save_model
from gptpipe.model.optim import build_optimizers
from gptpipe.tokens.batches import Batches
from gptpipe.tokens.huggingface import save_tokenizer_json
from gptpipe.tokens.streams import Stream, open_stream
from gptpipe.tokens.tokenizer import TOKENIZER, Tokenizer
from gptpipe.training import runtime
from gptpipe.training.card import model_card
from gptpipe.training.checkpoint import Checkpoints, Journal, locked, run_key
from gptpipe.training.loop import Metrics, Plan, TrainState, train
from gptpipe.training.red_flags import red_flags

_VALIDATION_FIGURES = ("loss", "perplexity", "bits_per_byte", "token_accuracy")


class Record(Protocol):
    """Where a training is written down; the tracking store, or nothing."""

    @property
    def run_id(self) -> str | None: ...
    def metrics(self, entries: list[tuple[int, int, Metrics]]) -> None: ...
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
    where = runtime.resolve(section)
    lineage = verify(source)
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
    torch.manual_seed(params.seed)
    model = GPT(params.model, tokenizer.vocab_size)
    model.activation_checkpointing = section.activation_checkpointing
    initial = None
    if section.init_from is not None:
        initialise_from(model, Path(section.init_from))
        initial = sha256_of(Path(section.init_from) / WEIGHTS)
    model.to(where.device)
    micro_batch = runtime.micro_batch_size(
        section, params.model, tokenizer.vocab_size, model.n_parameters(), where.device
    )
    loss = torch.compile(model.loss, dynamic=False) if where.compiles else model.loss
    plan = Plan(section, n_steps, micro_batch, params.seed, where.precision, loss)
    state = TrainState(model, build_optimizers(model, section))
    key = run_key(
        {
            "seed": params.seed,
            "model": params.model.model_dump(),
            "train": section.model_dump(),
            "split": lineage.digest,
            "init_from": initial,
        }
    )
    say(
        f"train: {model.n_parameters():,} parameters, {len(train_stream.tokens):,} tokens, {n_steps:,} steps of "
        f"{section.batch_size} x {params.model.context_length} tokens "
        f"({n_steps * section.batch_size / batches.n_windows:.1f} epochs), on {where.device}"
    )
    folder = project_root() / ".gptpipe" / "checkpoints" / key
    with locked(folder):
        checkpoints = Checkpoints(folder, {**where.describe(), "micro_batch_size": micro_batch})
        notes = checkpoints.restore(state, allow_inexact=allow_inexact()) or {}
        if notes:
            say(f"train: resumed after step {state.step:,}")
        journal = Journal(folder / "journal.jsonl", notes.get("journal_lines", 0))
        with open_record(notes.get("run_id"), lineage, checkpoints.environment) as record:
            progress = Progress("train", unit="steps", total=n_steps, done=state.step)
            observer = _Observer(params, state, plan, val_stream, tokenizer, checkpoints, journal, record, progress)
            with runtime.StopRequest() as stop, progress:
                train(
                    state,
                    batches,
                    plan,
                    validate=observer.validate,
                    report=observer.report,
                    save=observer.save,
                    log=observer.log,
                    should_stop=lambda: stop.signum is not None,
                )
            if stop.signum is not None and state.step < n_steps:
                raise Interrupted(stop.signum, f"train: saved after step {state.step:,}; rerun to continue from there")
            best = observer.write_results(target, reports, lineage)
        journal.close()
        checkpoints.remove()
    return best


class _Observer:
    """What the loop calls out to: validation, reports, checkpoints, logs; and in the end, the results."""

    def __init__(
        self,
        params: Params,
        state: TrainState,
        plan: Plan,
        val_stream: Stream,
        tokenizer: Tokenizer,
        checkpoints: Checkpoints,
        journal: Journal,
        record: Record,
        progress: Progress,
    ) -> None:
        self.params, self.state, self.plan = params, state, plan
        self.val_stream, self.tokenizer = val_stream, tokenizer
        self.checkpoints, self.journal, self.record, self.progress = checkpoints, journal, record, progress
        self._n_sent = 0  # entries of the journal that went to the record
        self._flags_said: set[str] = set()

    def log(self, step: int, metrics: Metrics) -> None:
        self.journal.append(step, time.time_ns() // 1_000_000, metrics)
        if "train/loss" in metrics:
            speed = f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
            self.progress.advance(note=f"loss {metrics['train/loss']:.3f}  {speed}")

    def validate(self) -> float:
        scores = score(self.state.model, self.val_stream, precision=self.plan.precision)
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
        self.record.text(f"samples/step-{self.state.step:08d}.md", self._samples())
        self._send()

    def save(self) -> None:
        self.checkpoints.save(self.state, {"run_id": self.record.run_id, "journal_lines": self.journal.sync()})
        self._send()

    def write_results(self, target: Path, reports: Path, lineage: Manifest) -> Figures:
        """Write the best model and the curves, each whole or not at all; returns the best validation's figures."""
        best = self.state.best
        assert best is not None  # the loop validates at step 0
        found = next(
            metrics for step, _, metrics in self.journal.entries if step == best.step and "val/loss" in metrics
        )
        params = self.params
        batch_tokens = params.train.batch_size * params.model.context_length
        flags = red_flags(self.state.history, self.plan.n_steps)
        summary: dict[str, Any] = {
            "best_step": best.step,
            "steps": self.state.step,
            "tokens": self.state.step * batch_tokens,
            "parameters": self.state.model.n_parameters(),
            "val": {name.removeprefix("val/"): value for name, value in found.items()},
            "red_flags": sorted(flags),
        }
        with new_folder(target, lineage.lineage("split")) as folder:
            weights = self.checkpoints.load_best(best.step)
            save_model(folder.path, params.model, self.tokenizer.vocab_size, self.tokenizer.end_of_text, weights)
            self.tokenizer.save(folder.path)
            save_tokenizer_json(folder.path, self.tokenizer, params.model.context_length)
            write_bytes(folder.path / "README.md", model_card(params, summary, lineage).encode())
            folder.counts = {name: summary[name] for name in ("best_step", "steps", "tokens", "parameters")}
        write_json(reports / "train.json", summary)
        write_bytes(reports / "train.steps.csv", self._curve("train/loss", ["loss", "grad_norm", "lr"]))
        write_bytes(reports / "train.validations.csv", self._validation_curve())
        write_json(reports / "mlflow_run.json", {"run_id": self.record.run_id})
        self.record.tags({"best_step": str(best.step)})
        self._send()
        figures_of_best: Figures = summary["val"]
        return figures_of_best

    def _send(self) -> None:
        self.record.metrics(self.journal.entries[self._n_sent :])
        self._n_sent = len(self.journal.entries)

    def _samples(self) -> str:
        """Continuations of the sample prompts, as Markdown; the same seed each time, so that they compare."""
        section = self.params.train
        sampling = Sampling(temperature=0.8, top_k=50, seed=self.params.seed)
        parts = []
        for prompt in section.sample_prompts:
            pieces = continue_text(self.state.model, self.tokenizer, prompt, section.sample_tokens, sampling)
            parts.append(f"**{prompt}**{''.join(pieces)}\n")
        return "\n---\n\n".join(parts)

    def _curve(self, marker: str, names: list[str]) -> bytes:
        """CSV of the journal's entries that hold `marker`: the step, and these metrics of its group."""
        group = marker.split("/")[0]
        rows = [{"step": step, **{name: metrics[f"{group}/{name}"] for name in names}}
                for step, _, metrics in self.journal.entries if marker in metrics]  # fmt: skip
        return pd.DataFrame(rows, columns=["step", *names]).to_csv(index=False).encode()

    def _validation_curve(self) -> bytes:
        """CSV of the validations, with the mean training loss since the one before."""
        table = pd.read_csv(io.BytesIO(self._curve("val/loss", list(_VALIDATION_FIGURES))))
        table.insert(1, "train_loss", [validation.train_loss for validation in self.state.history])
        return table.rename(columns={"loss": "val_loss"}).to_csv(index=False).encode()

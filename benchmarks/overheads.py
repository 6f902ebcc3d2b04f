"""What a training does beside its steps, as shares of the whole default run.

    dvc repro split && python -m benchmarks.overheads

On the split in data/split with params.yaml's own settings: cutting batches, validating, saving checkpoints, and
starting up, from the end of the imports to the first step without the validation before it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import machine
from gptpipe.config import load_params
from gptpipe.evaluation.scoring import score
from gptpipe.model.gpt import GPT
from gptpipe.model.optim import build_optimizers
from gptpipe.tokens.batches import Batches
from gptpipe.tokens.streams import open_stream
from gptpipe.tokens.tokenizer import TOKENIZER, Tokenizer
from gptpipe.training import loop, session
from gptpipe.training.checkpoint import Checkpoints

SPLIT = Path("data/split")


class FirstStep(Exception):
    """Ends the training that start-up is measured with."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    params = load_params()
    startup, validation = start_up()
    section = params.train
    torch.manual_seed(params.seed)
    model = GPT(params.model, Tokenizer.load(SPLIT / TOKENIZER).vocab_size)
    batches = Batches(
        open_stream(SPLIT, "train").tokens,
        context_length=params.model.context_length,
        stride=section.stride,
        batch_size=section.batch_size,
        seed=params.seed,
    )
    n_steps = section.n_steps(batches.n_windows)
    state = loop.TrainState(model, build_optimizers(model, section), section.batch_size)
    plan = loop.Plan(section, n_steps, params.seed, torch.float32, model.loss)
    step = typical(lambda: loop.optimizer_step(state, batches, plan), 20)
    feeding = typical(lambda: batches.at(state.step), 200)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), {})
        saving = typical(lambda: checkpoints.save(state, {}), 5)
    whole = n_steps * step
    print(machine.describe() + "\n")
    print("| | once | in the run | of its steps' time |\n|---|---|---|---|")
    print(f"| optimizer step | {step * 1e3:.1f} ms | {n_steps:,} | |")
    print(f"| cutting a batch, within the step | {feeding * 1e3:.2f} ms | {n_steps:,} | {feeding / step:.2%} |")
    for name, seconds, times in (
        ("validation", validation, 1 + -(-n_steps // section.eval_every)),
        ("checkpoint", saving, -(-n_steps // section.save_every)),
        ("start-up, imports apart", startup, 1),
    ):
        print(f"| {name} | {seconds:.2f} s | {times} | {seconds * times / whole:.1%} |")


def typical(action: Callable[[], Any], n: int) -> float:
    """Median seconds of `n` times, after two more to warm up."""
    times = []
    for _ in range(n + 2):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def start_up() -> tuple[float, float]:
    """Seconds from a call of train_model to its first step, without the validation; and those of the validation."""
    validated = [0.0]

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        scores = score(*arguments, **options)
        validated.append(time.perf_counter() - started)
        return scores

    def first_step(*_: Any) -> Any:
        raise FirstStep

    @contextmanager
    def no_record(*_: Any) -> Iterator[Any]:
        yield NoRecord()

    with (
        mock.patch.object(session, "score", timed),
        mock.patch.object(loop, "optimizer_step", first_step),
        tempfile.TemporaryDirectory() as folder,
        suppress(FirstStep),
    ):
        started = time.perf_counter()
        session.train_model(load_params(), SPLIT, Path(folder), Path(folder), no_record)
    return time.perf_counter() - started - validated[-1], validated[-1]


class NoRecord:
    """A record that keeps nothing."""

    run_id: str | None = None

    def metrics(self, entries: list[loop.Entry]) -> None: ...

    def text(self, name: str, content: str) -> None: ...

    def tags(self, tags: dict[str, str]) -> None: ...


if __name__ == "__main__":
    main()

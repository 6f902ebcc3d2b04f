"""Milliseconds of a training step on a shared machine: alone, beside a busy process, and two trainings at once.

    python -m benchmarks.shared_machine [--rounds 10] [--only gptpipe]

A step of the default run, and of the same shape in `transformers` and in a plain loop, on random tokens. Each
runs twice: idle threads wait as long as is usual for the OpenMP runtime, or as long as gptpipe or the user
sets. All take turns in each round, so that other load affects all of them. The busy process has one thread,
like a compiler. `LD_PRELOAD` chooses another OpenMP runtime.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.training_speed import PlainGPT, SameBatch, peer, transformers_llama
from gptpipe.model.device import keep_freed_memory
from gptpipe.model.gpt import GPT
from gptpipe.params import load_params
from gptpipe.train.optim import build_optimizers
from gptpipe.train.runtime import be_deterministic
from gptpipe.train.state import TrainState
from gptpipe.train.step import Plan, optimizer_step

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 4096
# The defaults of GNU's runtime (iterations), and of Intel's and LLVM's (milliseconds), as they are documented.
USUAL = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each training in each situation")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a turn; it has at least one step")
    parser.add_argument("--only", choices=list(CONTENDERS), help="one contender")
    parser.add_argument("--worker", choices=list(CONTENDERS), help="a training that waits for turns, on stdin")
    options = parser.parse_args()
    if options.worker:
        take_turns(CONTENDERS[options.worker]())
        return
    contenders = [options.only] if options.only else list(CONTENDERS)
    print(machine.describe() + "\n")
    print(
        "| training | idle threads wait | alone | beside a busy process | two at once |\n|---|---|---|---|---|"
    )
    for contender, settings in compare(contenders, options.rounds, options.seconds).items():
        baseline = statistics.median(settings["as usual"]["alone"])
        for setting, times in settings.items():
            median = statistics.median(times["alone"])
            shared = " | ".join(shared_cell(times[situation], baseline) for situation in ("busy", "two"))
            print(f"| {contender} | {setting} | {median:,.0f} ({median / baseline:.2f}) | {shared} |")
    print("\nMedian of the turns, and the slowest one; in brackets relative to alone as usual.")


def shared_cell(times: list[float], baseline: float) -> str:
    """The median and the slowest of the turns, each also relative to `baseline`."""
    median, slowest = statistics.median(times), max(times)
    return f"{median:,.0f} ({median / baseline:.2f}), {slowest:,.0f} ({slowest / baseline:.2f})"


def compare(contenders: list[str], rounds: int, seconds: float) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Milliseconds per step in each turn, by contender, setting and situation (alone, busy, two)."""
    with ExitStack() as stack:
        pairs = {
            (contender, setting): tuple(stack.enter_context(Worker(contender, variables)) for _ in range(2))
            for contender in contenders
            for setting, variables in environments().items()
        }
        for pair in pairs.values():
            for worker in pair:
                worker.wait_until_ready()
        times: dict[str, dict[str, dict[str, list[float]]]] = {}
        for _ in range(rounds):
            for (contender, setting), (first, second) in pairs.items():
                of_pair = times.setdefault(contender, {}).setdefault(setting, {})
                of_pair.setdefault("alone", []).append(first.turn(seconds))
                of_pair.setdefault("busy", []).append(turn_beside_a_busy_process(first, seconds))
                of_pair.setdefault("two", []).append(turn_of_two(first, second, seconds))
    return times


def environments() -> dict[str, dict[str, str]]:
    """Environment variables with the usual values, and with those that gptpipe or the user sets."""
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    set_here = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", *USUAL) if name in os.environ}
    in_words = ", ".join(f"{name}={value}" for name, value in set_here.items())
    return {"as usual": {**others, **USUAL}, in_words: dict(os.environ)}


class Worker:
    """A training in a process, which steps only in its turns."""

    def __init__(self, contender: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.shared_machine", "--worker", contender],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends it

    def wait_until_ready(self) -> None:
        self.end_turn()

    def start_turn(self, seconds: float) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def end_turn(self) -> float:
        """Milliseconds per step of the turn."""
        assert self._process.stdout
        return float(self._process.stdout.readline())

    def turn(self, seconds: float) -> float:
        self.start_turn(seconds)
        return self.end_turn()


def turn_beside_a_busy_process(worker: Worker, seconds: float) -> float:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            return worker.turn(seconds)
        finally:
            busy.kill()


def turn_of_two(first: Worker, second: Worker, seconds: float) -> float:
    """Milliseconds per step of the slower one."""
    first.start_turn(seconds)
    second.start_turn(seconds)
    return max(first.end_turn(), second.end_turn())


def take_turns(step: Callable[[], None]) -> None:
    """For each line of stdin, step for that number of seconds, and print the mean milliseconds of a step."""
    print(1e3 * mean_seconds(step, 1.0), flush=True)  # a warm-up
    for line in sys.stdin:
        print(1e3 * mean_seconds(step, float(line)), flush=True)


def mean_seconds(step: Callable[[], None], seconds: float) -> float:
    """Step for `seconds`, at least once; returns the seconds of a step."""
    started, n_steps = time.perf_counter(), 0
    while n_steps == 0 or time.perf_counter() - started < seconds:
        step()
        n_steps += 1
    return (time.perf_counter() - started) / n_steps


def default_training() -> Callable[[], None]:
    """A step of the default run."""
    be_deterministic()
    keep_freed_memory()
    params = load_params(ROOT / "params.yaml")
    section = params.train.model_copy(update={"spike_sigmas": None})  # the same batch again is no usual course
    model = GPT(params.model, VOCAB_SIZE)
    state = TrainState(model, build_optimizers(model, section), section.batch_size)
    batches = SameBatch(*random_batch())
    plan = Plan(section, 10**6, params.seed, torch.float32, model.loss)

    def step() -> None:
        optimizer_step(state, batches, plan)

    return step


def peer_training(build: Callable[[dict[str, int], int], torch.nn.Module]) -> Callable[[], None]:
    """A step of a plain loop with AdamW, for a network of the default run's shape."""
    shape = load_params(ROOT / "params.yaml").model
    sizes = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "context_length")}
    step = peer(build(sizes, VOCAB_SIZE), torch.device("cpu"), torch.float32, False)
    tokens, targets = random_batch()
    return lambda: step(tokens, targets)


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets, (B, T) each, in the shape of the default run."""
    params = load_params(ROOT / "params.yaml")
    tokens, targets = torch.randint(
        VOCAB_SIZE, (2, params.train.batch_size, params.model.context_length), dtype=torch.int64
    )
    return tokens, targets


CONTENDERS: dict[str, Callable[[], Callable[[], None]]] = {
    "gptpipe": default_training,
    "plain loop": lambda: peer_training(PlainGPT),
    "transformers": lambda: peer_training(transformers_llama),
}

if __name__ == "__main__":
    main()

"""What a training spends besides its steps, as shares of the whole default run.

    dvc repro split && python -m benchmarks.overheads [--split data/split]

Uses the settings of params.yaml. It measures cutting batches, validation, saving checkpoints, start-up (from
the end of the imports to the first validation), and the record: steps beside a thread that logs to a live, a
refused and a silent server, each compared with no record, in turns.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from unittest import mock

import torch

from benchmarks import machine
from gptpipe.base.manifest import Manifest
from gptpipe.model.gpt import GPT
from gptpipe.params import Params, load_params
from gptpipe.record.run import RunRecord, training_run
from gptpipe.score.scoring import score
from gptpipe.train.checkpoint import Checkpoints
from gptpipe.train.inputs import load_inputs
from gptpipe.train.optim import build_optimizers
from gptpipe.train.runtime import loss_function
from gptpipe.train.session import NullRecord, train_model
from gptpipe.train.state import Entry, TrainState
from gptpipe.train.step import Plan, optimizer_step

ROUNDS, STEPS = 5, 20  # of the record: blocks of each kind, and steps of a block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", type=Path, default=Path("data/split"))
    split = parser.parse_args().split
    params = load_params()
    section = params.train
    start_up = seconds_to_first_validation(params, split)
    inputs = load_inputs(params, split)
    torch.manual_seed(params.seed)
    model = GPT(params.model, inputs.tokenizer.vocab_size)
    state = TrainState(model, build_optimizers(model, section), section.batch_size)
    loss = loss_function(model, section, inputs.tokenizer.end_of_text, is_compiled=False)
    plan = Plan(section, inputs.n_steps, params.seed, torch.float32, loss)

    def step() -> None:
        optimizer_step(state, inputs.batches, plan)

    step_seconds = median_seconds(step, 20)
    batch_seconds = median_seconds(lambda: inputs.batches.at(state.step), 200)
    validation = median_seconds(lambda: score(model, inputs.val, inputs.scoring), 3)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), {})
        saving = median_seconds(lambda: checkpoints.save(state), 5)
    n_steps = inputs.n_steps
    print(machine.describe() + "\n")
    print("| | once | in the run | of its steps' time |\n|---|---|---|---|")
    print(f"| optimizer step | {step_seconds * 1e3:.1f} ms | {n_steps:,} | |")
    share = batch_seconds / step_seconds
    print(f"| cutting a batch, within the step | {batch_seconds * 1e3:.2f} ms | {n_steps:,} | {share:.2%} |")
    for name, seconds, times in (
        ("validation", validation, 1 + -(-n_steps // section.eval_every)),
        ("checkpoint", saving, -(-n_steps // section.save_every)),
        ("start-up, imports apart", start_up, 1),
    ):
        share = seconds * times / (n_steps * step_seconds)
        print(f"| {name} | {seconds:.2f} s | {times} | {share:.1%} |")
    for name, share in slowdown_beside_a_record(step, params, inputs.split).items():
        print(f"| steps beside a {name} server | | | {share:+.1%} |", flush=True)


def median_seconds(action: Callable[[], object], n: int) -> float:
    """Median seconds of `n` calls, after two calls to warm up."""
    times = []
    for _ in range(n + 2):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


class _StartedError(Exception):
    """Ends the training that measures start-up."""


class _StoppingRecord(NullRecord):
    """Ends the training when it is first given metrics, which is immediately before the first validation."""

    def metrics(self, entries: list[Entry]) -> None:
        raise _StartedError


def seconds_to_first_validation(params: Params, split: Path) -> float:
    """Seconds from the call of train_model to its first validation, of a training in a temporary project."""
    with temporary_project(GPTPIPE_VERBOSITY="quiet") as root:
        started = time.perf_counter()
        with suppress(_StartedError):
            train_model(params, split, root / "gpt", root, lambda *_: nullcontext(_StoppingRecord()))
        return time.perf_counter() - started


@contextmanager
def temporary_project(**variables: str) -> Iterator[Path]:
    """The root of a new project, which has the checkpoints and the outbox; with these environment variables."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"DVC_ROOT": folder, **variables}),
    ):
        yield Path(folder)


def slowdown_beside_a_record(step: Callable[[], None], params: Params, split: Manifest) -> dict[str, float]:
    """How much slower a step is while its metrics go to a server: the median of ROUNDS pairs of blocks."""
    shares: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as addresses:
        for _ in range(ROUNDS):
            for name, address in addresses.items():
                alone = block_seconds(step, NullRecord())
                with (
                    temporary_project(MLFLOW_TRACKING_URI=address, MLFLOW_HTTP_REQUEST_TIMEOUT="2"),
                    training_run(params, None, split, {}, n_parameters=0) as record,
                ):
                    shares.setdefault(name, []).append(block_seconds(step, record) / alone - 1)
    return {name: statistics.median(values) for name, values in shares.items()}


def block_seconds(step: Callable[[], None], record: NullRecord | RunRecord) -> float:
    """Seconds of STEPS steps that log to `record`."""
    started = time.perf_counter()
    for i in range(STEPS):
        step()
        if i % 10 == 0:  # the records of a validation, far more often than in a run
            record.metrics([(i, i, {f"train/{name}": float(i) for name in ("loss", "lr", "grad_norm")})])
            record.text("samples.json", "x" * 1000)
    return time.perf_counter() - started


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """Addresses of a live `mlflow server`, of a port that refuses, and of one that never answers."""
    live, refused, silent = (socket.create_server(("127.0.0.1", 0)) for _ in range(3))
    ports = [server.getsockname()[1] for server in (live, refused, silent)]
    live.close()
    refused.close()
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/files",
    ]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(ports[0]), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # saves a dozen processes
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/health", timeout=5):
                break
            time.sleep(0.2)
        names = ("live", "refused", "silent")
        yield {name: f"http://127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        silent.close()


if __name__ == "__main__":
    main()

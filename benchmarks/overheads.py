"""What a training spends besides its steps, as shares of the whole default run.

    dvc repro split && python -m benchmarks.overheads

Uses the split in data/split and the settings of params.yaml. It measures cutting batches, validation, saving
checkpoints, start-up (from the end of the imports to the first step, without the first validation), and the
record: steps beside a thread that logs to a live, a refused and a silent server, each compared with no record,
in turns.
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import machine
from gptpipe.base.manifest import read_manifest
from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.model.gpt import GPT
from gptpipe.params import load_params
from gptpipe.record.run import training_run
from gptpipe.score.scoring import score
from gptpipe.train import loop, session
from gptpipe.train.batches import Batches
from gptpipe.train.checkpoint import Checkpoints
from gptpipe.train.optim import build_optimizers

SPLIT = Path("data/split")
ROUNDS, STEPS = 5, 20  # of the record: blocks of each kind, and steps of a block


class FirstStep(Exception):
    """Ends the training that measures start-up."""


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
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
    for name, share in beside_a_record(lambda: loop.optimizer_step(state, batches, plan)).items():
        print(f"| steps beside a {name} server | | | {share:+.1%} |")


def typical(action: Callable[[], Any], n: int) -> float:
    """Median seconds of `n` calls, after two calls to warm up."""
    times = []
    for _ in range(n + 2):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def start_up() -> tuple[float, float]:
    """Seconds from the call of train_model to its first step, except the validation; and of the validation."""
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


def beside_a_record(step: Callable[[], Any]) -> dict[str, float]:
    """How much slower a step is while its metrics go to a server: the median of ROUNDS pairs of blocks."""
    params, lineage = load_params(), read_manifest(SPLIT)
    slower: dict[str, list[float]] = {}

    def block(record: Any) -> float:
        started = time.perf_counter()
        for i in range(STEPS):
            step()
            if i % 10 == 0:  # a validation's worth of records, far more often than in a run
                record.metrics([(i, i, {f"train/{name}": float(i) for name in ("loss", "lr", "grad_norm")})])
                record.text("samples.json", "x" * 1000)
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as addresses:
        for _ in range(ROUNDS):
            for name, address in addresses.items():
                alone = block(NoRecord())
                environment = {
                    "MLFLOW_TRACKING_URI": address,
                    "DVC_ROOT": folder,
                    "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
                }
                with (
                    mock.patch.dict(os.environ, environment),
                    training_run(params, None, lineage, {}, n_parameters=0) as record,
                ):
                    slower.setdefault(name, []).append(block(record) / alone - 1)
                for left in Path(folder).glob(".gptpipe/outbox/*"):
                    left.unlink()
    return {name: statistics.median(shares) for name, shares in slower.items()}


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """Addresses of a live `mlflow server`, of a port that refuses, and of one that accepts and says nothing."""
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
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a dozen processes for nothing
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


class NoRecord:
    """A record that stores nothing."""

    run_id: str | None = None

    def metrics(self, entries: list[loop.Entry]) -> None: ...

    def text(self, name: str, content: str) -> None: ...

    def tags(self, tags: dict[str, str]) -> None: ...


if __name__ == "__main__":
    main()

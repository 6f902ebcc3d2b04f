"""Stage train in a project's root of its own, in this process or in one that can be killed."""

import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from gptpipe.base.files import sha256_of
from gptpipe.base.manifest import Manifest
from gptpipe.formats.streams import open_stream
from gptpipe.model.gpt import GPT
from gptpipe.params import Params
from gptpipe.score.metrics import Metrics
from gptpipe.shell.console import console
from gptpipe.shell.environment import rank_info
from gptpipe.shell.process import run
from gptpipe.train.batches import Batches
from gptpipe.train.session import train_model
from gptpipe.train.state import Entry

STEADY = (
    "models/gpt/model.safetensors",
    "models/gpt/manifest.json",
    "reports/train.steps.csv",
    "reports/train.validations.csv",
    "reports/train.json",
    "reports/train.samples.json",
)


class ListRecord:
    """A record that keeps what it is told."""

    def __init__(self, run_id: str | None) -> None:
        self.run_id = run_id or "run-1"
        self.entries: list[Entry] = []
        self.texts: dict[str, str] = {}
        self.tagged: dict[str, str] = {}
        self.environment: dict[str, Any] = {}
        self.stop_at: int | None = None  # a signal to this process, when metrics of this step arrive

    def metrics(self, entries: list[Entry]) -> None:
        self.entries += entries
        if self.stop_at is not None and any(step == self.stop_at for step, _, _ in entries):
            os.kill(os.getpid(), signal.SIGTERM)

    def text(self, name: str, content: str) -> None:
        self.texts[name] = content

    def tags(self, tags: dict[str, str]) -> None:
        # As the store does.
        self.tagged = {name: text for name, text in {**self.tagged, **tags}.items() if text}


class Project:
    """A project's root with a split; trains in it, whatever DVC_ROOT was before."""

    def __init__(self, root: Path, split: Path) -> None:
        self.root, self.split = root, split
        self.records: list[ListRecord] = []
        self.stores: list[TCPStore] = []  # that torchrun would keep

    def train(self, params: Params, stop_at: int | None = None) -> Metrics:
        @contextmanager
        def open_record(
            run_id: str | None, _: Manifest, environment: dict[str, Any], _n_parameters: int
        ) -> Iterator[ListRecord]:
            record = ListRecord(run_id)
            record.stop_at, record.environment = stop_at, environment
            self.records.append(record)
            yield record

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DVC_ROOT", str(self.root))
            start = params.train.init_from and Path(params.train.init_from)
            folders = (self.split, self.root / "models/gpt", self.root / "reports")
            return train_model(params, *folders, open_record, start or None)

    def digests(self) -> dict[str, str]:
        return {name: sha256_of(self.root / name) for name in STEADY}

    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in (self.root / ".gptpipe/checkpoints").glob("*/*") if p.is_dir())


def end_at_a_write(folder: Path) -> None:
    """End this process, with exit code 99, when it changes anything in a folder."""

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        changes = opens or event in ("os.rename", "os.mkdir", "os.remove")
        if changes and str(arguments[0]).startswith(str(folder)):
            os._exit(99)

    sys.addaudithook(check)


def run_out_of_memory_above(n_sequences: int) -> None:
    """Let the network fail as if memory were short with more sequences at once."""
    loss = GPT.loss

    def fails(model: GPT, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return loss(model, tokens if len(tokens) <= n_sequences else torch.empty(1 << 60), *rest, **options)

    GPT.loss = fails  # type: ignore[method-assign]


def train_and_exit(
    params: Params, split: Path, root: Path, stop_at: int | None, environment: dict[str, str]
) -> None:
    """A training as a process of its own, or one rank of it, whose words go to a file."""
    os.environ |= {"DVC_ROOT": str(root), **environment}
    if rank_info().n_ranks > 1:
        torch.set_num_threads(1)  # as torchrun
        console.file = (root / f"rank-{rank_info().rank}.err").open("a", buffering=1)
        if rank_info().rank > 0:
            console.quiet = True  # as stages/train.py
            end_at_a_write(root)
            run_out_of_memory_above(int(os.environ.get("TOY_SEQUENCES", "1000")))

    def main() -> None:
        Project(root, split).train(params, stop_at)

    run(main)


@cache
def _serve_trainings() -> None:
    """Let the server that processes are forked from import torch once, for all trainings.

    The reader of Parquet files may have started it before, with few imports; it gets this one too from now on.
    """
    preloaded = ["gptpipe.train.session", "gptpipe.collect.collect", "torch._dynamo", "torch.distributed.fsdp"]
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    forkserver.set_forkserver_preload(preloaded)
    with pytest.MonkeyPatch.context() as patch:
        # As the reader wants it, see gptpipe/base/parallel.py.
        patch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")
        forkserver.ensure_running()


def start(
    params: Params, project: Project, stop_at: int | None = None, **environment: str
) -> multiprocessing.process.BaseProcess:
    _serve_trainings()
    arguments = (params, project.split, project.root, stop_at, environment)
    process = multiprocessing.get_context("forkserver").Process(target=train_and_exit, args=arguments)
    process.start()
    return process


def start_ranks(
    n: int, params: Params, project: Project, stop_at: int | None = None, **environment: str
) -> list[multiprocessing.process.BaseProcess]:
    """One training by `n` processes over loopback, with what torchrun would tell them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    project.stores.append(store)
    common = {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        **environment,
    }
    return [start(params, project, stop_at, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(n)]


def wait_for_the_lock(project: Project, process: multiprocessing.process.BaseProcess) -> bool:
    """Whether the process came to hold the checkpoint folder, from where on it trains, before it ended."""
    while process.exitcode is None:
        holders = [path.read_text() for path in project.root.glob(".gptpipe/checkpoints/.*.lock")]
        if any(holder.startswith(f"process {process.pid} ") for holder in holders):
            return True
        time.sleep(0.005)
    return False


def fail_at_batch(
    monkeypatch: pytest.MonkeyPatch, project: Project, i: int, error: BaseException | None = None
) -> None:
    """Let the loss of one batch of the training be infinite, or raise an error."""
    real = GPT.loss
    stream = open_stream(project.split, "train")
    poison, _ = Batches(stream.tokens, context_length=16, stride=8, batch_size=4, seed=7).at(i)

    def loss(self: GPT, tokens: torch.Tensor, targets: torch.Tensor, **options: Any) -> torch.Tensor:
        if not torch.equal(tokens, poison):
            return real(self, tokens, targets, **options)
        if error:
            raise error
        return real(self, tokens, targets, **options) * math.inf

    monkeypatch.setattr(GPT, "loss", loss)

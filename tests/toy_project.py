"""Stage train in a project's root of its own, in this process or in one that can be killed."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptpipe.config import Params
from gptpipe.errors import GptpipeError
from gptpipe.evaluation.metrics import Figures
from gptpipe.files import Manifest, sha256_of
from gptpipe.training.loop import Entry
from gptpipe.training.session import train_model

STEADY = ("models/gpt/model.safetensors", "models/gpt/manifest.json", "reports/train.steps.csv",
          "reports/train.validations.csv", "reports/train.json", "reports/train.samples.json")  # fmt: skip


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
        self.tagged |= tags


class Project:
    """A project's root with a split; trains in it."""

    def __init__(self, root: Path, split: Path) -> None:
        self.root, self.split = root, split
        self.records: list[ListRecord] = []

    def train(self, params: Params, stop_at: int | None = None) -> Figures:
        @contextmanager
        def open_record(run_id: str | None, _: Manifest, environment: dict[str, Any]) -> Iterator[ListRecord]:
            record = ListRecord(run_id)
            record.stop_at, record.environment = stop_at, environment
            self.records.append(record)
            yield record

        return train_model(params, self.split, self.root / "models/gpt", self.root / "reports", open_record)

    def digests(self) -> dict[str, str]:
        return {name: sha256_of(self.root / name) for name in STEADY}

    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in (self.root / ".gptpipe/checkpoints").glob("*/*") if p.is_dir())


def train_and_exit(params: Params, split: Path, root: Path) -> None:
    """A training as a process of its own."""
    os.environ["DVC_ROOT"] = str(root)
    try:
        Project(root, split).train(params)
    except GptpipeError as error:
        raise SystemExit(error.exit_code) from error


def start(params: Params, project: Project) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")  # imports torch once, for all children
    context.set_forkserver_preload(["gptpipe.training.session", "gptpipe.corpus.collect", "torch._dynamo"])
    process = context.Process(target=train_and_exit, args=(params, project.split, project.root))
    process.start()
    return process


def wait_for_the_lock(project: Project, process: multiprocessing.process.BaseProcess) -> bool:
    """Whether the process came to hold the checkpoint folder, from where on it trains, before it ended."""
    while process.exitcode is None:
        owners = [path.read_text() for path in project.root.glob(".gptpipe/checkpoints/*/owner")]
        if owners == [f"process {process.pid}"]:
            return True
        time.sleep(0.005)
    return False

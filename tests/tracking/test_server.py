"""The record against a real `mlflow server` on SQLite that is killed in mid-run, and four writers at a fresh store."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tiny import LINEAGE

from gptpipe.config import Params
from gptpipe.tracking import record as record_module
from gptpipe.tracking.record import training_run
from gptpipe.tracking.store import connect

WRITER = """
import sys
from pathlib import Path
from gptpipe.config import load_params
from gptpipe.files import Manifest
from gptpipe.tracking.record import training_run
params, lineage = load_params(Path(sys.argv[1])), Manifest.model_validate_json(sys.argv[2])
with training_run(params, None, lineage, {}) as record:
    record.metrics([(step, step, {"train/loss": float(step)}) for step in range(50)])
print(record.run_id)
"""


class Server:
    """An `mlflow server` that can be killed and started again on the same store."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        artifacts = ["--artifacts-destination", str(self.folder / "server-artifacts")]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *artifacts, *where],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # a dozen processes for nothing
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def counts(self) -> Counter[tuple[str, int]]:
        """How many rows the store has of each metric and step of the training."""
        with closing(sqlite3.connect(self.folder / "server.db")) as database:
            return Counter(database.execute("select run_uuid, step from metrics where key = 'train/loss'").fetchall())


@pytest.fixture
def server(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(record_module, "_RETRY_SECONDS", 0.2)
    try:
        yield server
    finally:
        server.kill()


def entries(*steps: int) -> list[tuple[int, int, dict[str, float]]]:
    return [(step, 1000 + step, {"train/loss": float(step)}) for step in steps]


def wait_until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(0.05)


def test_a_server_killed_in_mid_run_gets_each_step_once(
    server: Server, project: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at step 3; steps 4 and 5 wait; a resumed training sends all from its journal, to the server come back."""
    server.start()
    with training_run(params, None, LINEAGE, {}) as first:
        first.metrics(entries(1, 2, 3))
        wait_until(lambda: len(server.counts()) == 3)
        server.kill()
        first.metrics(entries(4, 5))
    assert "does not answer" in capsys.readouterr().err
    assert [path.stem for path in (project / ".gptpipe/outbox").iterdir()] == [first.run_id]
    server.start()
    with training_run(params, first.run_id, LINEAGE, {}) as second:
        second.metrics(entries(1, 2, 3, 4, 5, 6))
    assert list((project / ".gptpipe/outbox").iterdir()) == []
    assert server.counts() == {(first.run_id, step): 1 for step in range(1, 7)}
    assert connect().get_run(first.run_id).info.status == "FINISHED"


def test_a_server_that_comes_late_gets_all(server: Server, params: Params) -> None:
    with training_run(params, None, LINEAGE, {}) as record:
        record.metrics(entries(1, 2))
        assert record.run_id is None
        server.start()
        wait_until(lambda: record.run_id is not None)
        record.metrics(entries(3))
    assert server.counts() == {(record.run_id, step): 1 for step in (1, 2, 3)}


@pytest.mark.slow
def test_four_writers_at_a_fresh_store(project: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WRITER, str(root / "params.yaml"), LINEAGE.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    writers = [
        subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    run_ids = [writer.communicate()[0].strip() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        rows = database.execute("select run_uuid, count(*) from metrics where key = 'train/loss' group by run_uuid")
        assert dict(rows.fetchall()) == dict.fromkeys(run_ids, 50)

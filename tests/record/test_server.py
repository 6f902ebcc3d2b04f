"""The record and a real `mlflow server`: late, killed, slow, silent, with wrong answers, with four writers."""

import functools
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
from tiny import LINEAGE
from toy_project import Project

from gptpipe.params import Params
from gptpipe.record import run as record_module
from gptpipe.record.outbox import send_outbox
from gptpipe.record.run import training_run
from gptpipe.record.store import connect
from gptpipe.shell.errors import Interrupted
from gptpipe.train.session import train_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("project")]

WRITERS = """
import os, sys
from pathlib import Path
from gptpipe.params import load_params
from gptpipe.base.manifest import Manifest
from gptpipe.record.run import training_run
params, lineage = load_params(Path(sys.argv[1])), Manifest.model_validate_json(sys.argv[2])
writers = []
while len(writers) < 4:
    writers.append(os.fork())  # after the imports, which take seconds
    if writers[-1] == 0:
        with training_run(params, None, lineage, {}, 1_853_056) as record:
            record.metrics([(step, step, {"train/loss": float(step)}) for step in range(50)])
        os._exit(0)
sys.exit(max(os.waitpid(writer, 0)[1] for writer in writers))
"""


class Server:
    """An `mlflow server` that can be killed and started again on the same store."""

    def __init__(self, folder: Path, store: str = "") -> None:
        self.port, self.folder = free_port(), folder
        self.uri, self.store = f"http://127.0.0.1:{self.port}", store or f"sqlite:///{folder / 'server.db'}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", self.store]
        artifacts = ["--artifacts-destination", str(self.folder / "server-artifacts")]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *artifacts, *where],
                # Job execution would start a dozen processes.
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):  # it has ended already
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def counts(self) -> Counter[tuple[str, int]]:
        """The number of rows that the store has for each run and step."""
        with closing(sqlite3.connect(self.folder / "server.db")) as database:
            return Counter(
                database.execute("select run_uuid, step from metrics where key = 'train/loss'").fetchall()
            )


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


class Middleman(ThreadingHTTPServer):
    """A proxy between a training and its server; `mood` is the way it answers."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, server: Server) -> None:
        self.port, self.server, self.mood = free_port(), server, "helpful"
        self.uri, self.is_over = f"http://127.0.0.1:{self.port}", threading.Event()
        super().__init__(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None: ...  # the client is gone


class Handler(BaseHTTPRequestHandler):
    server: Middleman

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match self.server.mood:
            case "silent":
                self.server.is_over.wait(60)
            case "broken":
                self.answer(500, b"out of order", "text/plain")
            case "dumb":  # like a proxy that asks for a login
                self.answer(200, b"<html>log in</html>", "text/html")
            case "slow":
                time.sleep(0.1)
                self.answer(*self.forward(body))
            case "forgetful" if self.path.endswith(("/create", "/log-batch", "/log-inputs")):
                self.forward(body)  # the request is executed, but the answer is lost
                self.answer(500, b"out of order", "text/plain")
            case _:
                self.answer(*self.forward(body))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def forward(self, body: bytes) -> tuple[int, bytes, str]:
        headers = {key: value for key, value in self.headers.items() if key not in ("Host", "Connection")}
        request = urllib.request.Request(
            self.server.server.uri + self.path, body or None, headers, method=self.command
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read(), response.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers["Content-Type"]

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


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
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_starts_late_and_is_killed_gets_each_step_once(
    server: Server, project: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 1 and 2 wait for the server's start. It is killed after step 3; steps 4 and 5 wait.

    A resumed training sends all steps from its journal, to the server that was started again.
    """
    with training_run(params, None, LINEAGE, {}, 1_853_056) as first:
        first.metrics(entries(1, 2))
        provisional_id = first.run_id
        server.start()
        wait_until(lambda: first.run_id != provisional_id)
        first.metrics(entries(3))
        wait_until(lambda: len(server.counts()) == 3)
        server.kill()
        first.metrics(entries(4, 5))
    assert "does not answer" in capsys.readouterr().err
    assert len(list((project / ".gptpipe/outbox").rglob("*.jsonl"))) == 1
    assert server.counts() == {(first.run_id, step): 1 for step in (1, 2, 3)}
    server.start()
    with training_run(params, first.run_id, LINEAGE, {}, 1_853_056) as second:
        second.metrics(entries(1, 2, 3, 4, 5, 6))
    assert list((project / ".gptpipe/outbox").rglob("*.jsonl")) == []
    assert server.counts() == {(first.run_id, step): 1 for step in range(1, 7)}
    assert connect().get_run(first.run_id).info.status == "FINISHED"


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not kill it."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def middleman(
    steady: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Middleman]:
    """A proxy in front of `steady` that this test logs to; all waits are short."""
    between = Middleman(steady)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("_RETRY_SECONDS", "_START_SECONDS", "_CLOSE_SECONDS", "_STOP_SECONDS"):
        monkeypatch.setattr(record_module, name, 0.2)
    try:
        yield between
    finally:
        between.is_over.set()
        between.shutdown()
        between.server_close()


def logged(key: str = "train/loss") -> dict[str, list[int]]:
    """The steps of a metric in each run of the experiment; all runs must be FINISHED."""
    client = connect()
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    return {run.info.run_id: [m.step for m in client.get_metric_history(run.info.run_id, key)] for run in runs}


@pytest.mark.parametrize("mood", ["silent", "broken", "dumb", "slow", "forgetful"])
def test_a_faulty_server_does_not_change_a_training_and_nothing_is_lost(
    middleman: Middleman, mood: str, project: Path, toy_split: Path, undisturbed: dict[str, str]
) -> None:
    """The weights are the same. What the store did not get waits, and is sent once the server works again."""
    params, middleman.mood = tiny.params(), mood
    open_record = functools.partial(training_run, params)
    train_model(params, toy_split, project / "models/gpt", project / "reports", open_record)
    assert Project(project, toy_split).digests() == undisturbed
    assert len(list((project / ".gptpipe/outbox").rglob("*.jsonl"))) == 1
    # The thread ends as it would with its process.
    wait_until(lambda: all(thread.name != "tracking" for thread in threading.enumerate()))
    middleman.mood = "helpful"
    for _ in range(10):  # the server may still work on an abandoned request, and refuse its repetition
        send_outbox()
        if not list((project / ".gptpipe/outbox").rglob("*.jsonl")):
            break
        time.sleep(1)
    assert list(logged().values()) == [list(range(1, params.train.max_steps + 1))]
    (run_id,) = logged("val/loss")
    assert connect().get_run(run_id).data.params["train.lr"] == str(params.train.lr)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, toy_split: Path) -> dict[str, str]:
    project = Project(tmp_path_factory.mktemp("undisturbed"), toy_split)
    project.train(tiny.params())
    return project.digests()


def test_a_training_resumed_before_its_store_answered_is_one_run(middleman: Middleman, params: Params) -> None:
    """Stopped and resumed while the server is broken: both are sent as one run, each step once."""
    middleman.mood = "broken"
    with suppress(Interrupted), training_run(params, None, LINEAGE, {}, 1_853_056) as first:
        first.metrics(entries(1, 2))
        first.tags({"rolled_back.00000002": "words"})
        raise Interrupted(15, "saved")
    with training_run(params, first.run_id, LINEAGE, {}, 1_853_056) as second:
        second.metrics(entries(1, 2, 3))
    middleman.mood = "helpful"
    send_outbox()
    ((run_id, steps),) = logged().items()
    assert steps == [1, 2, 3]
    assert connect().get_run(run_id).data.tags["rolled_back.00000002"] == "words"
    # By the name that it had before the store answered.
    with training_run(params, first.run_id, LINEAGE, {}, 1_853_056) as third:
        third.metrics(entries(3, 4))
    send_outbox()  # what was not sent because the waits are short
    assert logged() == {run_id: [1, 2, 3, 4]}
    assert third.run_id == run_id


@contextmanager
def sqlite_store(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield


@contextmanager
def postgresql_server(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An `mlflow server` on its own PostgreSQL cluster, on loopback. PostgreSQL does not run as root."""
    pytest.importorskip("psycopg2", reason="needs psycopg2")
    # Debian's are not in PATH.
    folders = [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    initdb, postgres = (shutil.which(name, path=os.pathsep.join(folders)) for name in ("initdb", "postgres"))
    if not (initdb and postgres):
        pytest.skip("needs PostgreSQL: install Debian's package postgresql")
    other: dict[str, str] = {}
    if os.getuid() == 0:
        if "postgres" not in {user.pw_name for user in pwd.getpwall()}:
            pytest.skip("needs a user postgres: PostgreSQL does not run as root")
        other = {"user": "postgres", "group": "postgres"}
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:  # the socket's path is short, and each user may enter
        if other:
            shutil.chown(folder, **other)
        data = f"{folder}/data"
        initialize = [initdb, "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"]
        subprocess.run(initialize, check=True, cwd="/", stdout=subprocess.DEVNULL, **other)
        command = [postgres, "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"]
        with (project / "postgres.log").open("wb") as log:
            process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **other)
        server = Server(project, f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres")
        try:
            server.start()
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
            yield
        finally:
            server.kill()
            process.send_signal(signal.SIGINT)  # its fast shutdown
            process.wait()


@pytest.mark.parametrize("store", [sqlite_store, postgresql_server])
def test_four_writers_at_a_fresh_store(
    store: Callable[..., AbstractContextManager[None]], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WRITERS, str(root / "params.yaml"), LINEAGE.model_dump_json()]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "four")
    (project / "mlflow.db").unlink()
    with store(project, monkeypatch):
        subprocess.run(command, cwd=project, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
        send_outbox()  # what a busy machine did not send in time
        assert list(logged().values()) == [list(range(50))] * 4

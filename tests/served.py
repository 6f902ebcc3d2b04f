"""A server of tiny models in a thread of this process, for tests with real clients."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from gptpipe.commands.serve import Server
from gptpipe.score.continuations import load_generator
from gptpipe.serve.app import create_app
from gptpipe.serve.limits import Limits
from gptpipe.serve.worker import Worker

HOSTS = frozenset({"127.0.0.1", "localhost"})


@dataclass
class Served:
    """A running server."""

    url: str
    workers: list[Worker]
    server: Server


@contextmanager
def serve(folders: Sequence[Path], limits: Limits | None = None, key: str | None = None) -> Iterator[Served]:
    """Serve the models of these folders under the folders' names until the block ends."""
    limits = limits or Limits(grace_seconds=0.2)
    workers = [Worker(folder.name, *load_generator(folder), limits) for folder in folders]
    app = create_app(workers, limits, key, HOSTS)
    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3), workers)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", workers, server)
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""The command `gptpipe serve` as a process: where it listens, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from gptpipe.commands.cli import _dispatch
from gptpipe.commands.serve import model_names
from gptpipe.shell.errors import ConfigError, IntegrityError, ResourceError

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_and_its_running_requests(
    folders: list[Path], signum: signal.Signals, code: int
) -> None:
    command = ["-m", "gptpipe.commands.cli", "serve", str(folders[0]), "--port", "0", "--max-tokens", "1000000"]
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.fullmatch(r"(http://127\.0\.0\.1:\d+): gpt\n", line)
        assert address, line
        errors: list[openai.APIError] = []
        is_running = threading.Event()

        def read() -> None:
            client = openai.OpenAI(base_url=f"{address[1]}/v1", api_key="none", max_retries=0)
            # Always the most probable token: this model then never ends a document.
            options = {"model": "gpt", "prompt": "the", "max_tokens": 1_000_000, "temperature": 0}
            with client:
                try:
                    for _ in client.completions.create(**options, stream=True):
                        is_running.set()
                except openai.APIError as error:
                    errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        assert is_running.wait(60)
        process.send_signal(signum)
        started = time.monotonic()
        assert process.wait(60) == code
        assert time.monotonic() - started < 30
        reader.join(20)
        assert [error.message for error in errors] == ["the server is shutting down; repeat the request later"]
        assert process.stderr is not None
        assert process.stderr.read() == f"error: {signum.name}: stopped\n"
    finally:
        process.kill()
        process.communicate()


def test_other_machines_need_a_key(folders: list[Path]) -> None:
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ConfigError, match=f"--host {host} lets other machines in; set GPTPIPE_SERVE_KEY"):
            _dispatch(["serve", str(folders[0]), "--host", host])


@pytest.mark.parametrize("key", ["", "short", "sixteen letters!", "sixteen-lettérs-"])
def test_a_weak_key_is_refused(folders: list[Path], monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("GPTPIPE_SERVE_KEY", key)
    with pytest.raises(ConfigError, match="must have 16 or more ASCII characters"):
        _dispatch(["serve", str(folders[0])])


def test_a_port_that_is_taken_is_a_resource_error(folders: list[Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ResourceError, match=rf"at 127\.0\.0\.1 port {port}: .*choose another --port"):
            _dispatch(["serve", str(folders[0]), "--port", port])
    with pytest.raises(ConfigError, match="--port is 99999; it must be 0 to 65535"):
        _dispatch(["serve", str(folders[0]), "--port", "99999"])


def test_models_have_different_names(tmp_path: Path) -> None:
    values = [Path("models/gpt"), "models:/gpt@champion", "models:/gpt/3"]
    assert list(model_names(values)) == ["gpt", "gpt@champion", "gpt/3"]
    with pytest.raises(ConfigError, match=r"a/gpt and b/gpt would both be called 'gpt'; rename one"):
        model_names([Path("a/gpt"), Path("b/gpt")])


def test_a_damaged_model_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="nothing"):
        _dispatch(["serve", str(tmp_path / "nothing"), "--port", "0"])
    with pytest.raises(ConfigError, match="neither models:/NAME@ALIAS nor models:/NAME/VERSION"):
        _dispatch(["serve", "models:gpt", "--port", "0"])

"""`gptpipe serve`: answer OpenAI's clients with trained models."""

import argparse
import ipaddress
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import uvicorn

from gptpipe.model.device import best_device, memory_errors
from gptpipe.record.starting_model import model_folder
from gptpipe.score.continuations import load_generator
from gptpipe.serve.app import create_app
from gptpipe.serve.limits import Limits
from gptpipe.serve.worker import Worker
from gptpipe.shell.console import printable
from gptpipe.shell.environment import serve_key
from gptpipe.shell.errors import ConfigError, ResourceError, first_line
from gptpipe.shell.process import stop_at_signals

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def serve(options: argparse.Namespace) -> None:
    """Serve until a signal. Raises ConfigError, InputError, IntegrityError, ResourceError."""
    key = serve_key()
    if key is None and not _is_loopback(options.host):
        raise ConfigError(
            f"--host {options.host} lets other machines in; set GPTPIPE_SERVE_KEY to a key for clients"
        )
    if not 0 <= options.port <= 65_535:
        raise ConfigError(f"--port is {options.port}; it must be 0 to 65535")
    if options.max_tokens < 1 or not options.timeout > 0:
        raise ConfigError("--max-tokens and --timeout must be above 0")
    limits = Limits(max_tokens=options.max_tokens, seconds=options.timeout)
    stop_at_signals()
    with ExitStack() as stack, _listen(options.host, options.port) as listener:
        names = model_names(options.models or [Path("models/gpt")])
        workers = [_start(name, value, limits, stack) for name, value in names.items()]
        host_names = _LOCAL_NAMES | {options.host.lower()} if key is None else None
        app = create_app(workers, limits, key, host_names)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(limits.grace_seconds) + 2,
        )
        print(printable(f"{_address(listener)}: {', '.join(names)}"), flush=True)
        Server(config, workers).run(sockets=[listener])


class Server(uvicorn.Server):
    """Ends the workers when it ends. After that, it raises the signal again."""

    def __init__(self, config: uvicorn.Config, workers: Sequence[Worker]) -> None:
        super().__init__(config)
        self._workers = workers

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for worker in self._workers:
            worker.close()
        await super().shutdown(sockets)
        for worker in self._workers:
            worker.join()


def model_names(values: Sequence[Path | str]) -> dict[str, Path | str]:
    """The name under which clients find each model -> its folder, or its address in the registry.

    A folder has its own name, a registered model what is behind `models:/`. Raises ConfigError.
    """
    names: dict[str, Path | str] = {}
    for value in values:
        name = value.resolve().name if isinstance(value, Path) else value.removeprefix("models:").strip("/")
        if name in names:
            raise ConfigError(f"{names[name]} and {value} would both be called {name!r}; rename one of them")
        names[name] = value
    return names


def _start(name: str, value: Path | str, limits: Limits, stack: ExitStack) -> Worker:
    temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder = model_folder("MODEL", value, temporary)
    model, tokenizer = load_generator(folder)
    with memory_errors(lambda: f"{value}: out of memory; serve fewer or smaller models"):
        model.to(best_device())
        return Worker(name, model.eval(), tokenizer, limits)


def _is_loopback(host: str) -> bool:
    """Whether only this machine can connect."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ResourceError(
            f"cannot listen at {host} port {port}: {first_line(error)}; choose another --port or --host"
        ) from error


def _address(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

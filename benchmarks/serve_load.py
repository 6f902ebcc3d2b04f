"""`gptpipe serve` under load: requests and tokens per second, and the time of a request, by number of clients.

Each client sends its next request when the last one is answered. Beside it, the same requests one after another
without a server: the most that one prompt at a time can reach.
"""

import argparse
import http.client
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from gptpipe.model.generate import Sampling
from gptpipe.score.continuations import load_generator
from gptpipe.score.text_batch import continue_text

_CLIENTS = (1, 8, 64)
_NEW_TOKENS = 64
_PROMPTS = ("The function returns", "A list of", "Raise an error if", "Return the number of", "class Example:")


@dataclass(frozen=True)
class Load:
    """Seconds of each request, the number of new tokens, and the seconds of all together."""

    times: list[float]
    n_tokens: int
    seconds: float

    def row(self, name: str) -> str:
        percentiles = statistics.quantiles(self.times, n=100, method="inclusive")
        return (
            f"| {name} | {len(self.times) / self.seconds:.1f} | {self.n_tokens / self.seconds:,.0f} "
            f"| {1000 * percentiles[49]:,.0f} | {1000 * percentiles[98]:,.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/gpt"))
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of clients")
    options = parser.parse_args()
    print(machine.describe())
    print("| clients | requests/s | tokens/s | p50, ms | p99, ms |\n|---|---|---|---|---|")
    print(alone(options.model, options.seconds).row("without a server, one at a time"), flush=True)
    command = [sys.executable, "-m", "gptpipe.commands.cli", "serve", str(options.model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.match(r"http://([\d.]+):(\d+): (\S+)", server.stdout.readline())
            assert address, "the server has not started"
            load(address[1], int(address[2]), address[3], 1, 2.0)  # warm-up
            for n_clients in _CLIENTS:
                result = load(address[1], int(address[2]), address[3], n_clients, options.seconds)
                print(result.row(str(n_clients)), flush=True)
        finally:
            server.terminate()


def alone(folder: Path, duration: float) -> Load:
    model, tokenizer = load_generator(folder)
    times: list[float] = []
    n_tokens = 0
    started = time.perf_counter()
    while time.perf_counter() < started + duration:
        sent = time.perf_counter()
        prompt = _PROMPTS[len(times) % len(_PROMPTS)]
        pieces = list(continue_text(model, tokenizer, prompt, _NEW_TOKENS, Sampling(seed=len(times))))
        n_tokens += len(pieces)  # a piece for each token
        times.append(time.perf_counter() - sent)
    return Load(times, n_tokens, time.perf_counter() - started)


def load(host: str, port: int, model: str, n_clients: int, duration: float) -> Load:
    """Clients that send requests for this time; the last requests are waited for, and count."""
    times: list[float] = []
    n_tokens: list[int] = []
    started = time.perf_counter()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(host, port, timeout=600)
        for i in itertools.count():
            sent = time.perf_counter()
            if sent > started + duration:
                break
            prompt = _PROMPTS[(number + i) % len(_PROMPTS)]
            body = {"model": model, "prompt": prompt, "max_tokens": _NEW_TOKENS, "seed": 10**6 * number + i}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            document = json.loads(answer.read())
            assert answer.status == 200, document
            times.append(time.perf_counter() - sent)
            n_tokens.append(document["usage"]["completion_tokens"])
        connection.close()

    threads = [threading.Thread(target=client, args=[number]) for number in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(times, sum(n_tokens), time.perf_counter() - started)


if __name__ == "__main__":
    main()

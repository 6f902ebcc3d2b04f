"""Counters of a server, in the text format that Prometheus reads."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds


class Histogram:
    """Counts of durations up to each bound, their sum and their number."""

    def __init__(self) -> None:
        self._counts = [0] * len(_BUCKETS)
        self._sum = 0.0
        self._n = 0

    def add(self, seconds: float) -> None:
        self._counts = [n + (seconds <= bound) for n, bound in zip(self._counts, _BUCKETS, strict=True)]
        self._sum += seconds
        self._n += 1

    def lines(self, name: str) -> Iterator[str]:
        yield f"# TYPE {name} histogram"
        for bound, count in zip(_BUCKETS, self._counts, strict=True):
            yield f'{name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self._n}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {self._n}"


class Metrics:
    """What the server has done since it started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()  # of completions, by status
        self._prompt_tokens: Counter[str] = Counter()  # by model
        self._generated_tokens: Counter[str] = Counter()
        self._seconds = Histogram()
        self._first_token_seconds = Histogram()

    def count_request(self, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[status] += 1
            self._seconds.add(seconds)

    def count_first_token(self, seconds: float) -> None:
        with self._lock:
            self._first_token_seconds.add(seconds)

    def count_tokens(self, model: str, n_prompt: int, n_generated: int) -> None:
        with self._lock:
            self._prompt_tokens[model] += n_prompt
            self._generated_tokens[model] += n_generated

    def text(self, sequences: Iterable[tuple[str, int, int]]) -> str:
        """All numbers. `sequences`: each model with its running and waiting sequences."""
        sequences = list(sequences)
        with self._lock:
            requests = {str(status): n for status, n in sorted(self._requests.items())}
            lines = [
                *_family("gptpipe_requests_total", "counter", "status", requests),
                *_family("gptpipe_prompt_tokens_total", "counter", "model", self._prompt_tokens),
                *_family("gptpipe_generated_tokens_total", "counter", "model", self._generated_tokens),
                *_family("gptpipe_sequences_running", "gauge", "model", {name: n for name, n, _ in sequences}),
                *_family("gptpipe_sequences_waiting", "gauge", "model", {name: n for name, _, n in sequences}),
                *self._seconds.lines("gptpipe_request_seconds"),
                *self._first_token_seconds.lines("gptpipe_first_token_seconds"),
            ]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, label: str, values: dict[str, int]) -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    for value, number in values.items():
        escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        yield f'{name}{{{label}="{escaped}"}} {number}'

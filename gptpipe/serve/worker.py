"""One thread per model that continues the sequences of all requests together.

A new sequence joins at the next token, and one that has ended makes room at once (continuous batching: Yu et
al., 2022, Orca, OSDI).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.generate import Token, token_log_probabilities
from gptpipe.model.gpt import GPT
from gptpipe.score.text_batch import Piece, TextBatch, TextRequest, TextSequence
from gptpipe.serve.errors import ApiError, shutting_down
from gptpipe.serve.limits import Limits
from gptpipe.shell.console import complain
from gptpipe.shell.errors import first_line


@dataclass(frozen=True)
class PromptScores:
    """The log probabilities of all tokens of a prompt but the first."""

    tokens: list[Token]


Event = PromptScores | Piece | ApiError  # a sequence ends with an error, or a piece with a reason


class Job:
    """One sequence of a request. `emit` is called in the thread of the worker."""

    def __init__(
        self,
        request: TextRequest,
        emit: Callable[[Event], None],
        seconds: float,
        *,
        scores_prompt: bool = False,
    ) -> None:
        self.request = request
        self.emit = emit
        self.deadline = time.monotonic() + seconds
        self.scores_prompt = scores_prompt
        self.is_cancelled = False  # set by the thread of the request; nothing is emitted any more


class Worker:
    """The thread that runs one model. The network must be on its device, and no one else may use it."""

    def __init__(self, name: str, model: GPT, tokenizer: Tokenizer, limits: Limits) -> None:
        """Raises ResourceError if keys and values of `limits.sequences` full contexts do not fit in memory."""
        self.name = name
        self.tokenizer = tokenizer
        self.context_length = model.params.context_length
        self.created = int(time.time())
        self._model = model
        self._limits = limits
        self._waiting: deque[Job] = deque()
        self._running: dict[TextSequence, Job] = {}
        self._batch = self._new_batch()
        self._condition = threading.Condition()
        self._closes_at: float | None = None  # running sequences end with an error then
        self._thread = threading.Thread(target=self._work, name=f"worker of {name}", daemon=True)
        self._thread.start()

    def _new_batch(self) -> TextBatch:
        return TextBatch(self._model, self.tokenizer, self._limits.sequences, self.context_length)

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self._closes_at is None

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return len(self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the sequences of a request. Raises ApiError if the queue is full, or the server ends."""
        with self._condition:
            if not self.is_healthy:
                raise shutting_down()
            if len(self._waiting) + len(jobs) > self._limits.queue:
                raise ApiError(
                    429, "too many requests are waiting; repeat the request later", code="queue_full"
                )
            self._waiting.extend(jobs)
            self._condition.notify()

    def close(self) -> None:
        """Refuse new requests, end those that wait, and give running ones a few seconds."""
        with self._condition:
            if self._closes_at is None:
                self._closes_at = time.monotonic() + self._limits.grace_seconds
            waiting = list(self._waiting)
            self._waiting.clear()
            self._condition.notify()
        for job in waiting:
            job.emit(shutting_down())

    def join(self) -> None:
        """Wait for the thread, after `close`. A step that takes too long ends with the process instead."""
        self._thread.join(self._limits.grace_seconds + 2)

    def _work(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._running or self._closes_at):
                    self._condition.wait()
                if self._closes_at and not (self._waiting or self._running):
                    return
                n_free = self._limits.sequences - len(self._running)
                joining = [self._waiting.popleft() for _ in range(min(n_free, len(self._waiting)))]
            try:
                self._turn(joining)
            # Whatever fails, the requests get an answer and the server goes on.
            except Exception as error:
                complain(f"error: {self.name}: {type(error).__name__}: {first_line(error)}")
                failure = ApiError(500, f"the model failed: {first_line(error)}", code="model_failed")
                self._fail({*joining, *self._running.values()}, failure)

    def _turn(self, joining: Sequence[Job]) -> None:
        """Let new sequences join, end those that are late or cancelled, and compute a token of the others."""
        for job in joining:
            self._join(job)
        now = time.monotonic()
        is_closing = self._closes_at is not None and now > self._closes_at
        for sequence, job in list(self._running.items()):
            if job.is_cancelled or is_closing or now > job.deadline:
                self._batch.remove(sequence)
                del self._running[sequence]
                if not job.is_cancelled:
                    job.emit(shutting_down() if is_closing else self._late())
        if self._running:
            for sequence, piece in self._batch.step():
                self._running[sequence].emit(piece)
                if piece.finish_reason is not None:
                    del self._running[sequence]

    def _join(self, job: Job) -> None:
        if job.is_cancelled:
            return
        if time.monotonic() > job.deadline:
            job.emit(self._late())
            return
        if job.scores_prompt:
            n_alternatives = job.request.n_alternatives or 0
            job.emit(PromptScores(token_log_probabilities(self._model, job.request.prompt, n_alternatives)))
        if job.request.max_new_tokens == 0:
            job.emit(Piece("", [], "length"))
        else:
            self._running[self._batch.add(job.request)] = job

    def _late(self) -> ApiError:
        return ApiError(
            503, f"the request took more than {self._limits.seconds:g} seconds; ask for less", code="timeout"
        )

    def _fail(self, jobs: set[Job], error: ApiError) -> None:
        """End these sequences, and start with an empty batch."""
        self._running.clear()
        self._batch = self._new_batch()
        for job in jobs:
            if not job.is_cancelled:
                job.emit(error)

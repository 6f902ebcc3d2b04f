"""The HTTP interface: completions, models, health, metrics, and a page to try the models."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from gptpipe.serve.errors import ApiError, shutting_down
from gptpipe.serve.limits import Limits
from gptpipe.serve.metrics import Metrics
from gptpipe.serve.protocol import (
    Choice,
    Chunk,
    CompletionRequest,
    parse_request,
    raise_for_error,
    read_prompts,
    text_requests,
)
from gptpipe.serve.worker import Event, Job, PromptScores, Worker

_PAGE = Path(__file__).with_name("page.html")


def create_app(
    workers: Sequence[Worker], limits: Limits, key: str | None, host_names: frozenset[str] | None
) -> FastAPI:
    """The application. With a `key`, every request but `/` and `/health` must have it.

    `host_names`: the values of the header Host that are accepted; None for all. A server without a key needs
    them. Otherwise a web site could reach it under a name of its own (DNS rebinding).
    """
    service = _Service(workers, limits)

    def check_host(request: Request) -> None:
        name = re.sub(r":\d+$", "", request.headers.get("host", "")).lower()
        if host_names is not None and name not in host_names:
            raise ApiError(403, "the header Host has another name than this server", code="wrong_host")

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(check_host)])
    protected = APIRouter(dependencies=[Depends(check_key)])
    protected.add_api_route("/v1/models", service.models)
    protected.add_api_route("/v1/models/{name:path}", service.model)
    protected.add_api_route("/v1/completions", service.completions, methods=["POST"], response_model=None)
    protected.add_api_route("/metrics", service.metrics_text, response_class=PlainTextResponse)
    app.include_router(protected)
    app.add_api_route("/health", service.health)
    page, headers = _PAGE.read_text(), page_headers(_PAGE.read_text())
    app.add_api_route("/", lambda: HTMLResponse(page, headers=headers), response_class=HTMLResponse)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    return app


async def _answer_error(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # of the router: an unknown path or method
        error = ApiError(error.status_code, str(error.detail))
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


def page_headers(page: str) -> dict[str, str]:
    """Headers that let the page run its own script and style, and talk to this server, but nothing else."""

    def digest(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


class _Service:
    """The functions behind the paths."""

    def __init__(self, workers: Sequence[Worker], limits: Limits) -> None:
        self._workers = {worker.name: worker for worker in workers}
        self._limits = limits
        self._metrics = Metrics()

    async def health(self) -> JSONResponse:
        is_healthy = all(worker.is_healthy for worker in self._workers.values())
        return JSONResponse({"status": "ok" if is_healthy else "failing"}, 200 if is_healthy else 503)

    async def metrics_text(self) -> PlainTextResponse:
        sequences = [(worker.name, worker.n_running, worker.n_waiting) for worker in self._workers.values()]
        return PlainTextResponse(self._metrics.text(sequences), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [_describe(worker) for worker in self._workers.values()]}

    async def model(self, name: str) -> dict[str, Any]:
        return _describe(self._worker(name))

    def _worker(self, name: str) -> Worker:
        if name not in self._workers:
            reason = f"there is no model {name!r:.100}; there are {', '.join(self._workers)}"
            raise ApiError(404, reason, param="model", code="model_not_found")
        return self._workers[name]

    async def completions(self, http: Request) -> Response:
        """Answer with the whole completion, or with a stream of its chunks."""
        started = time.monotonic()
        try:
            request = parse_request(await self._body(http))
            completion = _Completion(request, self._worker(request.model), self._limits, self._metrics)
            if not request.stream:
                document = await _unless_disconnected(http, completion)
                self._metrics.count_request(200, time.monotonic() - started)
                return JSONResponse(document)
        except ApiError as error:
            self._metrics.count_request(error.status, time.monotonic() - started)
            raise
        return StreamingResponse(self._stream(completion, started), media_type="text/event-stream")

    async def _stream(self, completion: "_Completion", started: float) -> AsyncIterator[str]:
        """Server-sent events. The status of the answer is sent already, so an error is an event too."""
        status = 200
        try:
            async for document in completion.stream():
                yield f"data: {json.dumps(document)}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:
            status = error.status
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            completion.cancel()
            self._metrics.count_request(status, time.monotonic() - started)

    async def _body(self, http: Request) -> bytes:
        """The body of a request, up to a size. Raises ApiError."""
        media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # web sites may send other types to any server
            raise ApiError(415, "the header Content-Type must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in http.stream():
                    body += part
                    if len(body) > self._limits.body_bytes:
                        raise ApiError(413, f"a request has at most {self._limits.body_bytes:,} bytes")
        except TimeoutError as error:
            raise ApiError(408, "the request did not arrive in time") from error
        return bytes(body)


class _Completion:
    """The work on one request: its sequences run, and their events arrive in a queue."""

    def __init__(self, request: CompletionRequest, worker: Worker, limits: Limits, metrics: Metrics) -> None:
        """Check the request, and submit its sequences. Raises ApiError."""
        self._request = request
        self._worker = worker
        self._metrics = metrics
        self._started = time.monotonic()
        self._header = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": worker.name,
        }
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        prompts = read_prompts(request, worker.tokenizer, worker.context_length)
        sequences = text_requests(request, prompts, limits)
        self._n_prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._n_new_tokens = 0
        self._choices = [
            Choice(i, prompt, worker.tokenizer, request) for i, (prompt, _) in enumerate(sequences)
        ]
        loop = asyncio.get_running_loop()

        def emitter(index: int) -> Any:
            def emit(event: Event) -> None:
                with suppress(RuntimeError):  # the loop has ended: nobody waits
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return emit

        scores_prompt = request.echo and request.logprobs is not None
        self._jobs = [
            Job(sequence, emitter(i), limits.seconds, scores_prompt=scores_prompt)
            for i, (_, sequence) in enumerate(sequences)
        ]
        worker.submit(self._jobs)

    def cancel(self) -> None:
        """End all sequences: their answer is complete, or nobody waits for it."""
        for job in self._jobs:
            job.is_cancelled = True

    async def _chunks(self) -> AsyncIterator[Chunk]:
        """The chunks of all choices, as they come. Raises ApiError."""
        unfinished = set(range(len(self._jobs)))
        is_first = True
        try:
            while unfinished:
                index, event = await self._events.get()
                chunk = self._choices[index].chunk(raise_for_error(event))
                if is_first:
                    self._metrics.count_first_token(time.monotonic() - self._started)
                    is_first = False
                if self._jobs[index].request.max_new_tokens and not isinstance(event, PromptScores):
                    self._n_new_tokens += 1
                if chunk.finish_reason is not None:
                    unfinished.remove(index)
                yield chunk
        finally:
            self._metrics.count_tokens(self._worker.name, self._n_prompt_tokens, self._n_new_tokens)

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._n_prompt_tokens,
            "completion_tokens": self._n_new_tokens,
            "total_tokens": self._n_prompt_tokens + self._n_new_tokens,
        }

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The documents of a stream."""
        async for chunk in self._chunks():
            if not chunk.is_empty:
                yield {**self._header, "choices": [chunk.document()]}
        if self._request.stream_options.include_usage:
            yield {**self._header, "choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        """The document of an answer without a stream."""
        choices: dict[int, Chunk] = {}
        async for chunk in self._chunks():
            if chunk.index in choices:
                choices[chunk.index].extend(chunk)
            else:
                choices[chunk.index] = chunk
        documents = [choices[index].document() for index in sorted(choices)]
        return {**self._header, "choices": documents, "usage": self._usage()}


async def _unless_disconnected(http: Request, completion: _Completion) -> dict[str, Any]:
    """The whole completion. If the client goes away, its sequences end, and ApiError is raised."""

    async def disconnection() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.create_task(completion.whole()), asyncio.create_task(disconnection())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client has gone")
        return work.result()
    except asyncio.CancelledError as error:  # the server ends
        raise shutting_down() from error
    finally:
        completion.cancel()
        work.cancel()
        gone.cancel()


def _describe(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.name,
        "object": "model",
        "created": worker.created,
        "owned_by": "gptpipe",
        "context_length": worker.context_length,
    }

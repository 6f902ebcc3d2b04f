"""Requests and answers of `/v1/completions`, as OpenAI's clients send and read them."""

import codecs
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.generate import Sampling, Token
from gptpipe.score.text_batch import FinishReason, Piece, TextRequest, prompt_tokens
from gptpipe.serve.errors import ApiError
from gptpipe.serve.limits import (
    MAX_ALTERNATIVES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    SEQUENCES_PER_REQUEST,
    Limits,
)
from gptpipe.serve.worker import Event, PromptScores
from gptpipe.shell.errors import ConfigError, InputError

_SEEDS = 2**63
# Fields of OpenAI that this server has no use for, with the values that ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False  # random characters against eavesdroppers; never sent


class CompletionRequest(BaseModel):
    """The body of a request. A field that is null has its default. Defaults are those of OpenAI."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int = Field(16, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None  # this and the next two are not OpenAI's
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = Field(None, ge=0, lt=_SEEDS)
    n: int = Field(1, ge=1, le=SEQUENCES_PER_REQUEST)
    best_of: int | None = None
    stop: str | list[str] = []
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name, neutral in _WITHOUT_EFFECT.items():
            if given.pop(name, neutral[0]) not in neutral:
                raise ApiError(400, f"{name} is not supported; leave it out", param=name)
        return given

    def stops(self) -> list[str]:
        """The stop strings. Raises ApiError."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > MAX_STOPS:
            raise ApiError(400, f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", param="stop")
        for stop in stops:
            if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
                raise ApiError(
                    400, f"a string in stop must have 1 to {MAX_STOP_CHARACTERS} characters", param="stop"
                )
        return stops

    def samplings(self) -> list[Sampling]:
        """How to draw each of the `n` texts of a prompt: with the seed, the seed plus 1, and so on.

        Raises ApiError.
        """
        first_seed = secrets.randbelow(_SEEDS) if self.seed is None else self.seed
        try:
            return [
                Sampling(
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    min_p=self.min_p,
                    repetition_penalty=self.repetition_penalty,
                    seed=(first_seed + i) % _SEEDS,
                )
                for i in range(self.n)
            ]
        except ConfigError as error:
            raise ApiError(400, str(error), param=str(error).split()[0]) from error


def parse_request(body: bytes) -> CompletionRequest:
    """The request in a body of JSON. Raises ApiError that names the first field that is wrong."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if param == "prompt":
            reason = "must be a text, a list of texts, a list of token ids, or a list of such lists"
        else:
            reason = first["msg"]
        raise ApiError(400, f"{param}: {reason}" if param else reason, param=param) from error
    if request.best_of not in (None, request.n):
        raise ApiError(400, "best_of must be equal to n; leave it out", param="best_of")
    return request


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request."""

    text: str
    tokens: list[int]


def read_prompts(request: CompletionRequest, tokenizer: Tokenizer, context_length: int) -> list[Prompt]:
    """The prompts of a request. Raises ApiError if there are none or too many, or one is too long."""
    prompts = list(_prompts(request.prompt, tokenizer))
    if not 1 <= len(prompts) * request.n <= SEQUENCES_PER_REQUEST:
        reason = f"prompts times n must be 1 to {SEQUENCES_PER_REQUEST}, not {len(prompts) * request.n}"
        raise ApiError(400, reason, param="prompt")
    for prompt in prompts:
        if len(prompt.tokens) > context_length:
            reason = (
                f"a prompt has {len(prompt.tokens):,} tokens; the context of the model has {context_length:,}"
            )
            raise ApiError(400, reason, param="prompt", code="context_length_exceeded")
    return prompts


def _prompts(value: str | list[str] | list[int] | list[list[int]], tokenizer: Tokenizer) -> Iterator[Prompt]:
    is_one = isinstance(value, str) or (len(value) > 0 and isinstance(value[0], int))
    for item in cast(list[str | list[int]], [value] if is_one else value):
        if isinstance(item, str):
            try:
                yield Prompt(item, prompt_tokens(tokenizer, item))
            except InputError as error:
                raise ApiError(400, str(error), param="prompt") from error
        else:
            if not item or not all(0 <= i < tokenizer.vocab_size for i in item):
                reason = f"token ids of a prompt must be 0 to {tokenizer.vocab_size - 1:,}, and not none"
                raise ApiError(400, reason, param="prompt")
            yield Prompt(tokenizer.decode(item), item)


def text_requests(
    request: CompletionRequest, prompts: Sequence[Prompt], limits: Limits
) -> list[tuple[Prompt, TextRequest]]:
    """The sequences of a request, in the order of its choices. Raises ApiError."""
    if request.max_tokens > limits.max_tokens:
        reason = f"max_tokens is {request.max_tokens}; this server allows {limits.max_tokens}"
        raise ApiError(400, reason, param="max_tokens")
    stops, samplings = request.stops(), request.samplings()
    return [
        (
            prompt,
            TextRequest(
                prompt=prompt.tokens,
                max_new_tokens=request.max_tokens,
                sampling=sampling,
                stop=stops,
                n_alternatives=request.logprobs,
            ),
        )
        for prompt in prompts
        for sampling in samplings
    ]


@dataclass
class LogProbabilities:
    """OpenAI's lists: an element for each token."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, tokenizer: Tokenizer, token: Token, offset: int) -> None:
        """A token whose text begins at a character of the choice's text."""
        names = ((token_text(tokenizer, id_), value) for id_, value in token.alternatives)
        is_first = token.log_probability is None  # of a prompt; nothing predicts it
        self.tokens.append(token_text(tokenizer, token.id))
        self.token_logprobs.append(token.log_probability)
        self.top_logprobs.append(None if is_first else dict(names))
        self.text_offset.append(offset)

    def extend(self, other: "LogProbabilities") -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset


@dataclass
class Chunk:
    """A part of a choice; the whole choice is the sum of its chunks."""

    index: int
    text: str
    log_probabilities: LogProbabilities | None
    finish_reason: FinishReason | None

    @property
    def is_empty(self) -> bool:
        has_tokens = self.log_probabilities is not None and bool(self.log_probabilities.tokens)
        return not (self.text or has_tokens or self.finish_reason)

    def document(self) -> dict[str, Any]:
        """An element of `choices`."""
        logprobs = None if self.log_probabilities is None else vars(self.log_probabilities)
        return {
            "text": self.text,
            "index": self.index,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }

    def extend(self, other: "Chunk") -> None:
        self.text += other.text
        self.finish_reason = other.finish_reason
        if self.log_probabilities is not None and other.log_probabilities is not None:
            self.log_probabilities.extend(other.log_probabilities)


class Choice:
    """Turns the events of one sequence into chunks."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer, request: CompletionRequest) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._has_log_probabilities = request.logprobs is not None
        self._unsent = prompt.text if request.echo else ""  # what comes before the next piece
        self._first_offset = len(self._unsent)

    def chunk(self, event: PromptScores | Piece) -> Chunk:
        """What this event adds to the choice."""
        log_probabilities = LogProbabilities() if self._has_log_probabilities else None
        text, self._unsent = self._unsent, ""
        if isinstance(event, PromptScores):
            assert log_probabilities is not None
            tokens = (Token(self._prompt.tokens[0]), *event.tokens)
            offsets = _offsets(self._tokenizer, self._prompt.tokens)
            for token, offset in zip(tokens, offsets, strict=True):
                log_probabilities.add(self._tokenizer, token, offset)
            return Chunk(self._index, text, log_probabilities, None)
        if log_probabilities is not None:
            for new in event.tokens:
                log_probabilities.add(self._tokenizer, new.token, self._first_offset + new.offset)
        return Chunk(self._index, text + event.text, log_probabilities, event.finish_reason)


def raise_for_error(event: Event) -> PromptScores | Piece:
    """The event, unless it is an error."""
    if isinstance(event, ApiError):
        raise event
    return event


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as OpenAI shows it: parts of a character as `bytes:` and escapes, a special token by its name."""
    content = tokenizer.decode_bytes([token])
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
    names = (name for name, id_ in tokenizer.special_tokens.items() if id_ == token)
    return text or next(names, "")


def _offsets(tokenizer: Tokenizer, tokens: Sequence[int]) -> Iterator[int]:
    """The number of complete characters before each token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offset = 0
    for token in tokens:
        yield offset
        offset += len(decoder.decode(tokenizer.decode_bytes([token])))

"""Text from the network: prompts that are continued together, in pieces of whole characters.

The command `gptpipe generate`, the model that MLflow serves, `gptpipe serve` and the Python interface use this.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.generate import Batch, Sampling, Token, TokenSequence
from gptpipe.model.gpt import GPT

FinishReason = Literal["stop", "length"]  # end of the document or a stop string; enough tokens

_AT_ONCE = 16  # sequences; each needs a cache of keys and values for its tokens


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What to continue, and how."""

    prompt: Sequence[int]  # one or more tokens: see `prompt_tokens`
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()  # strings before which the text ends
    n_alternatives: int | None = None  # most probable tokens reported with each; None: no probabilities


@dataclass(frozen=True, slots=True)
class TextToken:
    """A new token, and the number of characters of the continuation that are complete before it."""

    token: Token
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step adds to a text: characters that no stop string can take back, and their tokens."""

    text: str
    tokens: list[TextToken]
    finish_reason: FinishReason | None = None  # None: the text goes on


class TextSequence:
    """One continuation: turns its tokens into pieces of text."""

    def __init__(self, tokenizer: Tokenizer, request: TextRequest) -> None:
        self.request = request
        self.n_tokens = 0  # new ones, with the end-of-text token
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""  # complete characters
        self._n_given = 0  # of these characters, in pieces
        self._held: list[TextToken] = []  # tokens that are in no piece yet

    def add(self, token: Token) -> Piece:
        """The piece that follows from the next token."""
        self.n_tokens += 1
        if token.id == self._tokenizer.end_of_text:
            return self._piece("stop")
        self._held.append(TextToken(token, len(self._text)))
        # A character may span several tokens: the decoder keeps its first bytes.
        self._text += self._decoder.decode(self._tokenizer.decode_bytes([token.id]))
        return self._piece("length" if self.n_tokens == self.request.max_new_tokens else None)

    def _piece(self, finish_reason: FinishReason | None) -> Piece:
        if finish_reason is not None:
            self._text += self._decoder.decode(b"", final=True)
        end, is_stopped = text_before_stop(self._text, self._n_given, self.request.stop)
        if is_stopped:
            finish_reason = "stop"
        elif finish_reason is not None:
            end = len(self._text)
        text = self._text[self._n_given : end]
        self._n_given = end
        is_complete = finish_reason is not None and not is_stopped
        n_tokens = len(self._held) if is_complete else sum(token.offset < end for token in self._held)
        tokens, self._held = self._held[:n_tokens], self._held[n_tokens:]
        return Piece(text, tokens, finish_reason)


def text_before_stop(text: str, start: int, stop: Sequence[str]) -> tuple[int, bool]:
    """Where the part of `text` ends that is before any stop string, and whether there is a stop string.

    No stop string begins before `start`. The end of the text that may become a stop string is left out.
    """
    found = [place for place in (text.find(string, start) for string in stop) if place >= 0]
    if found:
        return min(found), True
    n_new = len(text) - start
    beginnings = (string[:n] for string in stop for n in range(1, min(len(string), n_new + 1)))
    n_open = max((len(part) for part in beginnings if text.endswith(part, start)), default=0)
    return len(text) - n_open, False


class TextBatch:
    """Texts that are continued together; they may join and leave before any step."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_sequences: int, max_tokens: int) -> None:
        """As for `Batch`: room for `max_sequences` of `max_tokens` tokens. Raises ResourceError."""
        self._batch = Batch(model, max_sequences, max_tokens)
        self._tokenizer = tokenizer
        self._texts: dict[TokenSequence, TextSequence] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, request: TextRequest) -> TextSequence:
        """Continue this one too, from the next step on."""
        tokens = TokenSequence(request.prompt, request.sampling, request.n_alternatives)
        text = TextSequence(self._tokenizer, request)
        self._batch.add(tokens)
        self._texts[tokens] = text
        return text

    def remove(self, text: TextSequence) -> None:
        """End this one early."""
        tokens = next(tokens for tokens, other in self._texts.items() if other is text)
        self._batch.remove(tokens)
        del self._texts[tokens]

    def step(self) -> list[tuple[TextSequence, Piece]]:
        """The next piece of each text. A text that is finished leaves. Raises NumericError."""
        sequences = list(self._batch.sequences)
        new = zip(sequences, self._batch.step(), strict=True)
        pieces = [(self._texts[sequence], self._texts[sequence].add(token)) for sequence, token in new]
        for text, piece in pieces:
            if piece.finish_reason is not None:
                self.remove(text)
        return pieces


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; for an empty one the end-of-text token, after which a new document begins."""
    return tokenizer.encode(prompt) or [tokenizer.end_of_text]


def continue_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces of whole characters.

    It ends at the end of the document, before the first of the strings in `stop`, or after `max_new_tokens`. Of
    a prompt longer than the context, the model sees only the end: see `announce_cut`.
    """
    tokens = prompt_tokens(tokenizer, prompt)
    batch = TextBatch(model, tokenizer, 1, len(tokens) + max_new_tokens)
    batch.add(TextRequest(prompt=tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop))
    while batch:
        for _, piece in batch.step():
            yield piece.text


def continue_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> list[str]:
    """The continuation of each prompt, as `continue_text` gives it; up to 16 at once, which is faster."""
    tokenized = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    if not tokenized:
        return []
    batch = TextBatch(model, tokenizer, min(len(prompts), _AT_ONCE), max(map(len, tokenized)) + max_new_tokens)
    texts = [""] * len(prompts)
    numbers: dict[TextSequence, int] = {}
    waiting = list(enumerate(tokenized))
    while waiting or batch:
        while waiting and len(batch) < _AT_ONCE:
            number, tokens = waiting.pop(0)
            request = TextRequest(prompt=tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
            numbers[batch.add(request)] = number
        for text, piece in batch.step():
            texts[numbers[text]] += piece.text
    return texts

"""Sampling from the network, one token at a time, with cached keys and values.

Several sequences are continued together, one token each per step. They have different lengths, and each may
join or leave before any step. Nothing of one sequence reaches another: prompts are padded at their end, where
the causal mask hides it, and each sequence has its own random numbers. So a sequence gets the tokens that it
gets alone, but for rounding: a matrix product of other size may differ in its last bits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptpipe.model.decoding import Decoder
from gptpipe.model.device import available_memory, is_sharded
from gptpipe.model.gpt import GPT, KVCache
from gptpipe.shell.errors import ConfigError, NumericError, ResourceError

_STARTED_AT_ONCE = 8192  # tokens of prompts in one pass, padding included; limits its memory
_SCORED_AT_ONCE = 256  # positions whose logits are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Raises ConfigError."""

    temperature: float = 1.0  # 0: always the most probable token
    top_k: int | None = None  # only the k most probable tokens; None: all
    top_p: float = 1.0  # only the smallest set of tokens whose probabilities add up to this
    min_p: float = 0.0  # only tokens with at least this share of the largest probability
    repetition_penalty: float = 1.0  # above 1: tokens that are in the context become less probable
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more, and finite"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0, and finite"),
            "seed": (0 <= self.seed < 2**63, "0 or more, and below 2^63"),
        }
        for name, (is_valid, allowed) in checks.items():
            if not is_valid:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {allowed}")


@dataclass(frozen=True, slots=True)
class Token:
    """A new token. Log probabilities are the model's, in nats, before temperature and the other options."""

    id: int
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()  # the most probable tokens, with their log probabilities


class TokenSequence:
    """A prompt with its new tokens. `n_alternatives`: None for no log probabilities."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, n_alternatives: int | None = None) -> None:
        assert len(prompt) > 0
        self.tokens = list(prompt)
        self.options = replace(sampling, seed=0)  # equal for sequences that differ in their seed only
        self.n_alternatives = n_alternatives
        self._random = torch.Generator().manual_seed(sampling.seed)

    def next_random(self) -> float:
        """A random number in [0, 1), from this sequence's own generator; 0 if none is needed."""
        if self.options.temperature == 0:
            return 0.0
        return torch.rand((), generator=self._random, dtype=torch.float64).item()


class Batch:
    """Sequences that are continued together. Uses no global random state, so it does not change a training.

    Of a prompt longer than the context, only the end is used. When the context of a sequence is full, its older
    half is dropped, and the rest is computed again from position 0. So the network sees between half a context
    and a whole one, and each new token costs about one more in such a pass, which takes less time than a step.
    """

    def __init__(self, model: GPT, max_sequences: int, max_tokens: int) -> None:
        """Make room for `max_sequences` of up to `max_tokens` tokens each, at most the context.

        Raises ResourceError if the cache does not fit in memory.
        """
        self._model = model
        self._context = model.params.context_length
        self._cache = _new_cache(model, max_sequences, max_tokens)
        # Weights that are spread over several processes are only complete inside the network.
        self._decoder = None if is_sharded(model.embedding.weight) else Decoder(model)
        self.sequences: list[TokenSequence] = []  # in the order of the rows of the cache
        self._new: set[TokenSequence] = set()  # those without any token in the cache

    def add(self, sequence: TokenSequence) -> None:
        """Continue this sequence too, from the next step on."""
        assert len(self.sequences) < len(self._cache.lengths)
        self._cache.lengths[len(self.sequences)] = 0
        self.sequences.append(sequence)
        self._new.add(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """Leave this sequence as it is. The last one takes its row of the cache."""
        row, last = self.sequences.index(sequence), len(self.sequences) - 1
        if row != last:
            length = self._cache.lengths[last]
            for stored in (*self._cache.keys, *self._cache.values):
                stored[row, :length] = stored[last, :length]
            self._cache.lengths[row] = length
            self.sequences[row] = self.sequences[last]
        self.sequences.pop()
        self._new.discard(sequence)

    def step(self) -> list[Token]:
        """The next token of each sequence, in the order of `sequences`. Raises NumericError."""
        if not self.sequences:
            return []
        was_training = self._model.training
        if was_training:
            self._model.eval()
        try:
            with torch.no_grad():
                logits = self._next_logits().float().cpu()  # (B, V)
        finally:
            if was_training:
                self._model.train()
        if not all(math.isfinite(bound) for bound in torch.stack(logits.aminmax()).tolist()):
            raise NumericError(
                "the model's logits are not finite: its weights are unusable; choose another model"
            )
        tokens = self._draw(logits)
        for sequence, token in zip(self.sequences, tokens, strict=True):
            sequence.tokens.append(token.id)
        return tokens

    def _next_logits(self) -> Tensor:
        """Logits (B, V) after the last token of each sequence."""
        lengths = self._cache.lengths
        n_pending: dict[int, int] = {}  # row -> tokens of a sequence that is not in the cache, or no longer
        for row, sequence in enumerate(self.sequences):
            if sequence in self._new:
                n_pending[row] = min(len(sequence.tokens), self._context)
            elif lengths[row] == self._context:
                n_pending[row] = max(1, self._context // 2)
        parts = [(rows, self._start(rows, n_pending)) for rows in _groups(n_pending)]
        continuing = [row for row in range(len(self.sequences)) if row not in n_pending]
        if continuing:
            parts.append((continuing, self._continue(continuing)))
        if len(parts) == 1:
            rows, logits = parts[0]
            return logits[torch.tensor(rows).argsort()] if n_pending else logits
        order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
        return torch.cat([logits for _, logits in parts])[order]

    def _start(self, rows: Sequence[int], n_pending: dict[int, int]) -> Tensor:
        """Compute the last `n_pending` tokens of these sequences from position 0; returns logits (rows, V)."""
        lengths = [n_pending[row] for row in rows]
        tokens = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens[i, :length] = torch.tensor(self.sequences[row].tokens[-length:])
            self._cache.lengths[row] = 0
        device = self._model.embedding.weight.device
        hidden = self._model.hidden(tokens.to(device), self._cache, rows=rows)  # (rows, T, D)
        for row, length in zip(rows, lengths, strict=True):
            self._cache.lengths[row] = length  # what is behind it comes from padding
            self._new.discard(self.sequences[row])
        last = torch.tensor(lengths, device=device) - 1
        logits: Tensor = self._model.head(hidden[torch.arange(len(rows), device=device), last])
        return logits

    def _continue(self, rows: Sequence[int]) -> Tensor:
        """Logits (rows, V) after the last token of these sequences, of which all others are in the cache."""
        device = self._model.embedding.weight.device
        last = torch.tensor([self.sequences[row].tokens[-1] for row in rows], device=device)
        if self._decoder is not None:
            return self._decoder.logits(last, self._cache, rows)
        logits: Tensor = self._model.head(self._model.hidden(last[:, None], self._cache, rows=rows)[:, 0])
        return logits

    def _draw(self, logits: Tensor) -> list[Token]:
        """A token of each sequence from its logits (B, V). Those with the same options are drawn together."""
        rows_by_options: dict[Sampling, list[int]] = {}
        for row, sequence in enumerate(self.sequences):
            rows_by_options.setdefault(sequence.options, []).append(row)
        ids = [0] * len(logits)
        for options, rows in rows_by_options.items():
            selected = logits if len(rows) == len(logits) else logits[rows]
            if options.repetition_penalty != 1:
                selected = self._penalised(selected, rows, options.repetition_penalty)
            random = torch.tensor([self.sequences[row].next_random() for row in rows], dtype=torch.float64)
            for row, token in zip(rows, draw(selected, options, random).tolist(), strict=True):
                ids[row] = token
        return [
            _with_log_probabilities(logits[row], id_, sequence.n_alternatives)
            for row, (id_, sequence) in enumerate(zip(ids, self.sequences, strict=True))
        ]

    def _penalised(self, logits: Tensor, rows: Sequence[int], penalty: float) -> Tensor:
        """Logits (rows, V) with the penalty for the tokens in the context of each sequence."""
        contexts = [torch.tensor(self.sequences[row].tokens[-self._context :]) for row in rows]
        pairs = zip(logits, contexts, strict=True)
        return torch.stack([penalise_repetition(one, context, penalty) for one, context in pairs])


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    """Continue prompts of one or more tokens; yields the next token of each, `max_new_tokens` times.

    Each prompt gets the tokens that it gets alone: see `Batch`, also for what happens beyond the context.
    Raises ResourceError if the cache does not fit in memory, NumericError if the logits are not finite.
    """
    batch = Batch(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    for prompt in prompts:
        batch.add(TokenSequence(prompt, sampling))
    for _ in range(max_new_tokens):
        yield [token.id for token in batch.step()]


def token_log_probabilities(model: GPT, tokens: Sequence[int], n_alternatives: int = 0) -> list[Token]:
    """The log probability of each token but the first, given those before it. At most a context of tokens."""
    assert 0 < len(tokens) <= model.params.context_length
    was_training = model.training
    model.eval()
    scored: list[Token] = []
    try:
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([tokens], device=model.embedding.weight.device))[0]  # (T, D)
            for start in range(0, len(tokens) - 1, _SCORED_AT_ONCE):
                targets = tokens[start + 1 : start + 1 + _SCORED_AT_ONCE]
                logits = model.head(hidden[start : start + len(targets)]).float().cpu()
                pairs = zip(logits, targets, strict=True)
                scored += [_with_log_probabilities(one, id_, n_alternatives) for one, id_ in pairs]
    finally:
        model.train(was_training)
    return scored


def _with_log_probabilities(logits: Tensor, id_: int, n_alternatives: int | None) -> Token:
    """A token and its log probability under the logits (V,); without numbers if `n_alternatives` is None."""
    if n_alternatives is None:
        return Token(id_)
    log_probabilities = logits.log_softmax(dim=-1)
    values, ids = log_probabilities.topk(min(n_alternatives, len(logits)))
    alternatives = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(id_, log_probabilities[id_].item(), alternatives)


def _groups(lengths: dict[int, int]) -> Iterator[list[int]]:
    """Divide rows with these lengths into groups that are computed together, so that padding stays small."""
    group: list[int] = []
    longest = 0
    for row in sorted(lengths, key=lengths.__getitem__, reverse=True):
        if group and (2 * lengths[row] < longest or (len(group) + 1) * longest > _STARTED_AT_ONCE):
            yield group
            group = []
        longest = longest if group else lengths[row]
        group.append(row)
    if group:
        yield group


def _new_cache(model: GPT, max_sequences: int, max_tokens: int) -> KVCache:
    """An empty cache. Raises ResourceError if it does not fit in memory."""
    params = model.params
    numbers_per_token = 2 * max_sequences * params.n_layer * params.n_kv_head * params.resolved_head_dim
    n_tokens_held = min(max_tokens, params.context_length)
    needed = numbers_per_token * n_tokens_held * model.embedding.weight.element_size()
    available = available_memory(model.embedding.weight.device)
    if needed > available:
        raise ResourceError(
            f"generation: the cache of keys and values takes {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available; generate fewer tokens"
        )
    return model.new_cache(max_sequences, max_tokens)


def penalise_repetition(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """Logits (V,), those of tokens in `context` (T,) divided by `penalty` if positive, else multiplied.

    Keskar et al., 2019, arXiv:1909.05858, section 4.1.
    """
    seen = logits.gather(-1, context)  # (T,)
    return logits.scatter(-1, context, torch.where(seen > 0, seen / penalty, seen * penalty))


def draw(logits: Tensor, sampling: Sampling, random: Tensor) -> Tensor:
    """One token id (B,) from logits (B, V), chosen by a random number (B,) from [0, 1), in float64, for each.

    Nucleus sampling after Holtzman et al., 2020 (arXiv:1904.09751), min-p after Nguyen et al., 2024
    (arXiv:2407.01082).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    order = None
    logits = logits.double()
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, order = logits.topk(sampling.top_k)  # most probable first
    elif sampling.top_p < 1:
        logits, order = logits.sort(descending=True)
    largest = logits.amax(dim=-1, keepdim=True)
    probabilities = ((logits - largest) / sampling.temperature).softmax(dim=-1)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if sampling.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # of all more probable tokens together
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    sums = probabilities.cumsum(dim=-1)
    # Below the total, also after rounding, so that a token of probability 0 is never chosen.
    target = torch.minimum(random[:, None] * sums[:, -1:], sums[:, -1:].nextafter(torch.zeros(())))
    chosen = torch.searchsorted(sums, target, right=True)  # the first token whose sum is above the target
    return (chosen if order is None else order.gather(-1, chosen))[:, 0]

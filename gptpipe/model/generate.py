"""Sampling from the network, one token at a time, with cached keys and values."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptpipe.errors import ConfigError
from gptpipe.model.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0  # 0: the most probable token, always
    top_k: int | None = None  # only the k most probable tokens
    top_p: float = 1.0  # only the smallest set of tokens that together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or (self.top_k is not None and self.top_k < 1):
            raise ConfigError(
                "sampling needs temperature of 0 or more, top_k of 1 or more, and top_p above 0, at most 1"
            )


def generate(model: GPT, prompts: Tensor, max_new_tokens: int, sampling: Sampling) -> Iterator[Tensor]:
    """Continue prompts (B, T), T of 1 or more, by `max_new_tokens`; yields the next token of each, (B,) int64.

    Draws from a generator of its own, so training is not disturbed. Once the context is full, its older half is
    forgotten. A prompt longer than the context keeps its end.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    context = prompts[:, -model.params.context_length :]
    pending, cache = context, model.new_cache(len(prompts))
    try:
        for _ in range(max_new_tokens):
            if cache.length + pending.shape[1] > model.params.context_length:
                pending, cache = context[:, -(model.params.context_length // 2) :], model.new_cache(len(prompts))
            with torch.no_grad():
                last = model.head(model.hidden(pending, cache)[:, -1])  # (B, V)
            pending = draw(last.float().cpu(), sampling, generator).to(prompts.device)[:, None]  # (B, 1)
            context = torch.cat((context, pending), dim=1)[:, -model.params.context_length :]
            yield pending[:, 0]
    finally:
        model.train(was_training)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id (B,) from logits (B, V); nucleus sampling after Holtzman et al., 2020 (arXiv:1904.09751)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)  # probability of what ranks higher
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]

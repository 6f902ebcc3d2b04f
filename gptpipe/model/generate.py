"""Sampling from the network, one token at a time, with cached keys and values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptpipe.model.device import available_memory
from gptpipe.model.gpt import GPT, KVCache
from gptpipe.shell.errors import ConfigError, NumericError, ResourceError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0  # 0: the most probable token, always
    top_k: int | None = None  # only the k most probable tokens
    top_p: float = 1.0  # only the smallest set of tokens that together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        is_sound = 0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and 0 <= self.seed < 2**63
        if not is_sound or (self.top_k is not None and self.top_k < 1):
            raise ConfigError(
                "sampling needs temperature and seed of 0 or more, top_k of 1 or more, and top_p above 0, at most 1"
            )


def generate(model: GPT, prompts: Tensor, max_new_tokens: int, sampling: Sampling) -> Iterator[Tensor]:
    """Continue prompts (B, T), T of 1 or more, by `max_new_tokens`; yields the next token of each, (B,) int64.

    Draws from a separate generator, so training is not disturbed. Once the context is full, its older half is
    forgotten. A prompt longer than the context keeps its end. Raises ResourceError if the cache does not fit in memory,
    NumericError if the logits are not finite.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    context = prompts[:, -model.params.context_length :]
    pending, cache = context, _new_cache(model, len(prompts), context.shape[1] + max_new_tokens)
    try:
        for _ in range(max_new_tokens):
            if cache.length + pending.shape[1] > model.params.context_length:
                pending = context[:, -(model.params.context_length // 2) :]
                cache = model.new_cache(len(prompts), model.params.context_length)
            with torch.no_grad():
                last = model.head(model.hidden(pending, cache)[:, -1])  # (B, V)
            logits = last.float().cpu()
            if not logits.isfinite().all():
                raise NumericError("the model's logits are not finite: its weights are unusable; choose another model")
            pending = draw(logits, sampling, generator).to(prompts.device)[:, None]  # (B, 1)
            context = torch.cat((context, pending), dim=1)[:, -model.params.context_length :]
            yield pending[:, 0]
    finally:
        model.train(was_training)


def _new_cache(model: GPT, batch_size: int, n_tokens: int) -> KVCache:
    """An empty cache, after a check that it fits in memory."""
    params = model.params
    numbers = 2 * batch_size * params.n_layer * params.n_kv_head * params.head_width
    needed = numbers * min(n_tokens, params.context_length) * model.embedding.weight.element_size()
    available = available_memory(model.embedding.weight.device)
    if needed > available:
        raise ResourceError(
            f"generation: the cache of keys and values takes {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} are available; generate fewer tokens"
        )
    return model.new_cache(batch_size, n_tokens)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id (B,) from logits (B, V); nucleus sampling after Holtzman et al., 2020 (arXiv:1904.09751)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    ordered, order = logits.double().topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]))  # best first
    probabilities = ((ordered - ordered[:, :1]) / sampling.temperature).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the probability of what ranks higher
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, chosen)[:, 0]

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


def generate(model: GPT, prompts: Tensor, max_new_tokens: int, sampling: Sampling) -> Iterator[Tensor]:
    """Continue prompts (B, T), T >= 1, by `max_new_tokens`; yields the next token of each prompt, (B,) int64.

    Uses its own random generator, so sampling does not change training. When the context is full, its older
    half is dropped. Of a prompt longer than the context, only the end is used. Raises ResourceError if the
    cache does not fit in memory, NumericError if the logits are not finite.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    context = prompts[:, -model.params.context_length :]
    cache = _new_cache(model, len(prompts), context.shape[1] + max_new_tokens)
    pending = context  # tokens that are not in the cache yet
    try:
        for _ in range(max_new_tokens):
            if cache.length + pending.shape[1] > model.params.context_length:
                pending = context[:, -(model.params.context_length // 2) :]
                cache = model.new_cache(len(prompts), model.params.context_length)
            with torch.no_grad():
                logits = model.head(model.hidden(pending, cache)[:, -1]).float().cpu()  # (B, V)
            if not logits.isfinite().all():
                raise NumericError(
                    "the model's logits are not finite: its weights are unusable; choose another model"
                )
            logits = penalise_repetition(logits, context.cpu(), sampling.repetition_penalty)
            pending = draw(logits, sampling, generator).to(prompts.device)[:, None]  # (B, 1)
            context = torch.cat((context, pending), dim=1)[:, -model.params.context_length :]
            yield pending[:, 0]
    finally:
        model.train(was_training)


def _new_cache(model: GPT, batch_size: int, n_tokens: int) -> KVCache:
    """An empty cache. Raises ResourceError if it does not fit in memory."""
    params = model.params
    numbers_per_token = 2 * batch_size * params.n_layer * params.n_kv_head * params.resolved_head_dim
    n_tokens_held = min(n_tokens, params.context_length)
    needed = numbers_per_token * n_tokens_held * model.embedding.weight.element_size()
    available = available_memory(model.embedding.weight.device)
    if needed > available:
        raise ResourceError(
            f"generation: the cache of keys and values takes {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available; generate fewer tokens"
        )
    return model.new_cache(batch_size, n_tokens)


def penalise_repetition(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """Logits (B, V), those of tokens in `context` (B, T) divided by `penalty` if positive, else multiplied.

    Keskar et al., 2019, arXiv:1909.05858, section 4.1.
    """
    if penalty == 1:
        return logits
    seen = logits.gather(-1, context)  # (B, T)
    return logits.scatter(-1, context, torch.where(seen > 0, seen / penalty, seen * penalty))


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id (B,) from logits (B, V).

    Nucleus sampling after Holtzman et al., 2020 (arXiv:1904.09751), min-p after Nguyen et al., 2024
    (arXiv:2407.01082).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    n_candidates = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    ordered, order = logits.double().topk(n_candidates)  # most probable first
    probabilities = ((ordered - ordered[:, :1]) / sampling.temperature).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of all more probable tokens together
    is_excluded = (before >= sampling.top_p) | (probabilities < sampling.min_p * probabilities[:, :1])
    probabilities = probabilities.masked_fill(is_excluded, 0.0)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, chosen)[:, 0]

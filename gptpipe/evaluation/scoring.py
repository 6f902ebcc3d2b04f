"""Score every token of a stream except the very first, each exactly once, in consecutive windows of the context.

The last window is shorter. Nothing is sampled, and the batch size changes nothing but rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gptpipe.model.device import autocast
from gptpipe.model.gpt import GPT
from gptpipe.tokens.streams import Stream

_LOGITS = 1 << 24  # numbers of logits that one forward pass may make: 64 MB in float32

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Sums per document (documents,) and per position in the window (context_length,)."""

    nats: Array  # negative log-likelihood
    correct: Array  # tokens whose most probable prediction is right
    n_tokens: Array  # tokens scored
    nats_by_position: Array
    n_by_position: Array


def score(
    model: GPT,
    stream: Stream,
    *,
    precision: torch.dtype = torch.float32,
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Score a stream; `advance` hears of each batch how many tokens it scored.

    Memory: the logits of one batch or window, and three numbers per document.
    """
    context = model.params.context_length
    device = model.embedding.weight.device
    ends = (stream.documents["offset"] + stream.documents["n_tokens"]).to_numpy()
    sums = {name: np.zeros(len(ends)) for name in ("nats", "correct", "n_tokens")}
    by_position = {name: np.zeros(context) for name in ("nats", "n_tokens")}
    n_targets = max(0, len(stream.tokens) - 1)
    windows_per_batch = max(1, _LOGITS // (context * model.vocab_size))
    was_training = model.training
    model.eval()
    try:
        start = 0
        while start < n_targets:
            n_windows = min(windows_per_batch, (n_targets - start) // context)
            n = n_windows * context if n_windows else n_targets - start  # the rest is one shorter window
            chunk = torch.from_numpy(stream.tokens[start : start + n + 1].astype(np.int64)).to(device)
            nats, correct = _score_windows(model, chunk, max(1, n_windows), precision)
            document = np.searchsorted(ends, np.arange(start + 1, start + n + 1), side="right")
            position = np.arange(n) % context
            for name, values in (("nats", nats), ("correct", correct), ("n_tokens", np.ones(n))):
                sums[name] += np.bincount(document, weights=values, minlength=len(ends))
                if name in by_position:
                    by_position[name] += np.bincount(position, weights=values, minlength=context)
            start += n
            advance(n)
    finally:
        model.train(was_training)
    return Scores(sums["nats"], sums["correct"], sums["n_tokens"], by_position["nats"], by_position["n_tokens"])


@torch.no_grad()
def _score_windows(model: GPT, chunk: Tensor, n_windows: int, precision: torch.dtype) -> tuple[Array, Array]:
    """Nats and correctness of chunk[1:], given chunk[:-1] cut into equal windows."""
    tokens, targets = chunk[:-1].view(n_windows, -1), chunk[1:]
    with autocast(chunk.device, precision):
        logits = model(tokens).flatten(0, 1)  # (B * T, V)
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    correct = logits.argmax(dim=-1) == targets
    return nats.double().cpu().numpy(), correct.double().cpu().numpy()

"""Score every token of a stream except the very first, each exactly once, in consecutive windows of the context.

The last window is shorter. Nothing is sampled, and the batch size changes nothing but rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gptpipe.formats.streams import Stream
from gptpipe.model.device import autocast
from gptpipe.model.gpt import GPT

CONFIDENCE_BINS = 10  # of equal width, from 0 to 1
_LOGITS = 1 << 24  # numbers of logits that one forward pass may make: 64 MB in float32

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Sums over the tokens that fall to a column; rows: negative log-likelihood in nats, hits, tokens scored.

    A hit is a token whose most probable prediction is right.
    """

    by_document: Array  # (3, documents)
    by_position: Array  # (3, context_length), in the window
    by_confidence: Array  # (3, CONFIDENCE_BINS); for nats, the probability of the most probable token


def score(
    model: GPT,
    stream: Stream,
    *,
    precision: torch.dtype = torch.float32,
    part: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Score a stream, or part i of n, whose sums add up; they take turns, a batch each.

    `advance` hears of each turn how many tokens all parts score in it.
    Memory: the logits of one batch or window, three numbers per document and as many per position.
    """
    context = model.params.context_length
    device = model.embedding.weight.device
    ends = (stream.documents["offset"] + stream.documents["n_tokens"]).to_numpy()
    scores = Scores(*(np.zeros((3, n)) for n in (len(ends), context, CONFIDENCE_BINS)))
    n_targets = max(0, len(stream.tokens) - 1)
    n_full = n_targets // context * context  # in full windows; the rest is one shorter window
    step = max(1, _LOGITS // (context * model.vocab_size)) * context
    batches = list(pairwise(sorted({*range(0, n_full, step), n_full, n_targets})))
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(batches), part[1]):
            turn = batches[i : i + part[1]]
            for start, end in turn[part[0] :][:1]:
                n = end - start
                chunk = torch.from_numpy(stream.tokens[start : end + 1].astype(np.int64)).to(device)
                nats, hits, confidence = _score_windows(model, chunk, max(1, n // context), precision)
                document = np.searchsorted(ends, np.arange(start + 1, end + 1), side="right")
                bins = np.minimum(confidence * CONFIDENCE_BINS, CONFIDENCE_BINS - 1).astype(np.int64)
                for sums, columns, first in (
                    (scores.by_document, document, nats),
                    (scores.by_position, np.arange(n) % context, nats),
                    (scores.by_confidence, bins, confidence),
                ):
                    for row, values in zip(sums, (first, hits, np.ones(n)), strict=True):
                        row += np.bincount(columns, weights=values, minlength=len(row))
            advance(turn[-1][1] - turn[0][0])
    finally:
        model.train(was_training)
    return scores


@torch.no_grad()
def _score_windows(model: GPT, chunk: Tensor, n_windows: int, precision: torch.dtype) -> tuple[Array, Array, Array]:
    """Nats of chunk[1:], whether the most probable token is right, and its probability; windows of equal length."""
    tokens, targets = chunk[:-1].view(n_windows, -1), chunk[1:]
    with autocast(chunk.device, precision):
        logits = model(tokens).flatten(0, 1)  # (B * T, V)
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    best = logits.argmax(dim=-1)
    lead = (logits.gather(-1, best[:, None]) - logits.gather(-1, targets[:, None]))[:, 0].float()
    found = (nats, best == targets, (lead - nats).exp().clamp(max=1))
    losses, hits, confidence = (x.double().cpu().numpy() for x in found)
    return losses, hits, confidence

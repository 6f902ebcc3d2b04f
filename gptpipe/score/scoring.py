"""Score every token of a stream but the first, each once, in consecutive windows of the context length.

The last window may be shorter. Nothing is sampled, and the batch size affects only rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from gptpipe.formats.streams import Stream
from gptpipe.model.device import autocast
from gptpipe.model.gpt import GPT

CONFIDENCE_BINS = 10  # of equal width, from 0 to 1
_MAX_LOGITS = 1 << 24  # logits computed in one forward pass: 64 MB in float32

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Sums over tokens. Each array has three rows: negative log-likelihoods in nats, hits, and tokens.

    A token is a hit if it is the model's most probable token.
    """

    by_document: Array  # (3, documents)
    by_position: Array  # (3, context_length), position in the window
    by_confidence: Array  # (3, CONFIDENCE_BINS); the first row sums the probability of the most probable token instead


def score(
    model: GPT,
    stream: Stream,
    *,
    precision: torch.dtype = torch.float32,
    part: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Score a stream, or part i of n of it: `part` is (i, n). The scores of all parts add up.

    The parts take turns of one batch each. After each turn, `advance` is called with the number of tokens that
    all parts together score in it. Memory: the logits of one batch, three numbers per document, and as many per
    position.
    """
    context = model.params.context_length
    ends = (stream.documents["offset"] + stream.documents["n_tokens"]).to_numpy()
    scores = Scores(*(np.zeros((3, n)) for n in (len(ends), context, CONFIDENCE_BINS)))
    n_targets = max(0, len(stream.tokens) - 1)
    batches = _batches(n_targets, context, model.vocab_size)
    i_part, n_parts = part
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(batches), n_parts):
            turn = batches[i : i + n_parts]
            if i_part < len(turn):
                start, end = turn[i_part]
                nats, hits, confidence = _score_windows(model, stream.tokens[start : end + 1], precision)
                document = np.searchsorted(ends, np.arange(start + 1, end + 1), side="right")
                confidence_bin = np.minimum(confidence * CONFIDENCE_BINS, CONFIDENCE_BINS - 1).astype(np.int64)
                _add(scores.by_document, document, nats, hits)
                _add(scores.by_position, np.arange(end - start) % context, nats, hits)
                _add(scores.by_confidence, confidence_bin, confidence, hits)
            advance(turn[-1][1] - turn[0][0])
    finally:
        model.train(was_training)
    return scores


def _batches(n_targets: int, context: int, vocab_size: int) -> list[tuple[int, int]]:
    """First and last + 1 position of the tokens scored at once: whole windows, then the shorter last window."""
    n_in_full_windows = n_targets // context * context
    n_at_once = max(1, _MAX_LOGITS // (context * vocab_size)) * context
    return list(pairwise(sorted({*range(0, n_in_full_windows, n_at_once), n_in_full_windows, n_targets})))


def _add(sums: Array, columns: npt.NDArray[np.int64], first: Array, hits: Array) -> None:
    """Add the values of each token to its column of `sums`."""
    for row, values in zip(sums, (first, hits, np.ones(len(columns))), strict=True):
        row += np.bincount(columns, weights=values, minlength=len(row))


@torch.no_grad()
def _score_windows(
    model: GPT, tokens: npt.NDArray[np.unsignedinteger], precision: torch.dtype
) -> tuple[Array, Array, Array]:
    """Score tokens[1:] in windows of equal length: nats, whether the top token is right, its probability."""
    chunk = torch.from_numpy(tokens.astype(np.int64)).to(model.embedding.weight.device)
    targets = chunk[1:]
    n_windows = max(1, len(targets) // model.params.context_length)
    with autocast(chunk.device, precision):
        logits = model(chunk[:-1].view(n_windows, -1)).flatten(0, 1)  # (B * T, V)
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    best = logits.argmax(dim=-1)
    lead = (logits.gather(-1, best[:, None]) - logits.gather(-1, targets[:, None]))[:, 0].float()
    confidence = (lead - nats).exp().clamp(max=1)
    losses, hits, confidences = (x.double().cpu().numpy() for x in (nats, best == targets, confidence))
    return losses, hits, confidences

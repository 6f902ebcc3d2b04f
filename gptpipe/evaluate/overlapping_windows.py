"""Bits per byte with overlapping windows: a second metric, beside that of consecutive windows.

In consecutive windows, the first tokens of each window are predicted from little context, so a model with a
short context looks worse than it is. Here each window starts half a context after the one before, and only
tokens in its second half are scored: each token has at least half a context before it, or all of its stream.
Papers that use a stride report this number, and it is always lower. It takes twice the time.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from gptpipe.formats.streams import Stream
from gptpipe.model.device import autocast
from gptpipe.model.gpt import GPT, document_mask
from gptpipe.score.metrics import Metrics, ratio
from gptpipe.score.scoring import Scoring

NAME = "bits_per_byte_overlapping"
_MAX_LOGITS = 1 << 24  # computed in one forward pass: 64 MB in float32


def overlapping_metrics(model: GPT, stream: Stream, scoring: Scoring) -> Metrics:
    """The metric and its standard error over documents. Each token but the first is scored once."""
    nats = np.zeros(len(stream.documents))
    ends = (stream.documents["offset"] + stream.documents["n_tokens"]).to_numpy()
    for start, losses in _score(model, stream.tokens, scoring):
        positions = np.arange(start, start + len(losses))
        nats += np.bincount(np.searchsorted(ends, positions, side="right"), weights=losses, minlength=len(nats))
    value, error = ratio(nats / math.log(2), stream.documents["n_bytes"].to_numpy(dtype=np.float64))
    return {NAME: value, f"{NAME}_standard_error": error}


def _score(
    model: GPT, tokens: npt.NDArray[np.unsignedinteger], scoring: Scoring
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Yield the position of a token and the nats of the tokens from there on, in the order of the stream."""
    context = model.params.context_length
    stride = context // 2
    n_targets = len(tokens) - 1
    n_windows = max(0, (n_targets - context) // stride + 1)  # of full length
    n_at_once = max(1, _MAX_LOGITS // (context * max(model.vocab_size, context)))
    for first in range(0, n_windows, n_at_once):
        starts = np.arange(first, min(first + n_at_once, n_windows)) * stride
        nats = _nats(model, tokens[starts[:, None] + np.arange(context + 1)], scoring)  # (B, context)
        if first == 0:
            yield 1, nats[0, : context - stride]  # no window comes before it
        yield int(starts[0]) + context - stride + 1, nats[:, context - stride :].ravel()
    n_scored = (n_windows - 1) * stride + context if n_windows else 0
    if n_scored < n_targets:
        start = n_windows * stride  # of a last window that is shorter
        yield n_scored + 1, _nats(model, tokens[None, start:], scoring)[0, n_scored - start :]


@torch.no_grad()
def _nats(model: GPT, windows: npt.NDArray[np.unsignedinteger], scoring: Scoring) -> npt.NDArray[np.float64]:
    """Negative log-likelihoods (B, T) of all tokens but the first in windows (B, T + 1)."""
    ids = torch.from_numpy(windows.astype(np.int64)).to(model.embedding.weight.device)
    was_training = model.training
    model.eval()
    try:
        mask = None if scoring.end_of_text is None else document_mask(ids[:, :-1], scoring.end_of_text)
        with autocast(ids.device, scoring.precision):
            logits = model.head(model.hidden(ids[:, :-1], mask=mask))  # (B, T, V)
    finally:
        model.train(was_training)
    nats = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    values: npt.NDArray[np.float64] = nats.view(len(ids), -1).double().cpu().numpy()
    return values

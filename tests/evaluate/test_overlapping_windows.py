"""The metric with overlapping windows, compared with a loop over single tokens."""

import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from gptpipe.evaluate import overlapping_windows
from gptpipe.evaluate.overlapping_windows import NAME, overlapping_metrics
from gptpipe.formats.streams import Stream
from gptpipe.score.metrics import ratio
from gptpipe.score.scoring import Scoring


def stream_of(*lengths: int) -> Stream:
    """A stream of documents with these numbers of tokens, of 3 bytes each."""
    tokens = np.random.default_rng(0).integers(50, size=sum(lengths)).astype(np.uint16)
    offsets = np.cumsum([0, *lengths])[:-1]
    n_bytes = [3 * n for n in lengths]
    return Stream(tokens, pd.DataFrame({"offset": offsets, "n_tokens": lengths, "n_bytes": n_bytes}))


@pytest.mark.parametrize("max_logits", [1, 1 << 24], ids=["one window at once", "all at once"])
@pytest.mark.parametrize("context", [2, 7, 8])
@pytest.mark.parametrize("lengths", [(2,), (3, 5), (8, 1), (9,), (4, 13, 20), (30, 2)])
def test_each_token_is_scored_once_with_at_least_half_a_context(
    lengths: tuple[int, ...], context: int, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlapping_windows, "_MAX_LOGITS", max_logits)
    model = tiny.network(context_length=context)
    stream = stream_of(*lengths)
    stride = context // 2
    document = [i for i, n in enumerate(lengths) for _ in range(n)]
    nats = np.zeros(len(lengths))
    for target in range(1, len(stream.tokens)):
        # The start of the first window that contains the token.
        start = max(0, math.ceil((target - context) / stride)) * stride
        assert start == 0 or target - start > context - stride
        with torch.no_grad():
            logits = model(torch.from_numpy(stream.tokens[None, start:target].astype(np.int64)))[0, -1]
        nats[document[target]] -= logits.log_softmax(-1)[int(stream.tokens[target])].item()
    value, error = ratio(nats / math.log(2), stream.documents["n_bytes"].to_numpy(dtype=np.float64))
    expected = {NAME: value, f"{NAME}_standard_error": error}
    assert overlapping_metrics(model, stream, Scoring()) == pytest.approx(expected, rel=1e-5)

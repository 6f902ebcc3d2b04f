"""Scoring of every token but the first, exactly once, compared with a loop over single tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from gptpipe.formats.streams import Stream, open_stream
from gptpipe.score import scoring
from gptpipe.score.scoring import CONFIDENCE_BINS, Scores, score


def stream_of(*lengths: int) -> Stream:
    """A stream of documents with these numbers of tokens."""
    tokens = np.random.default_rng(0).integers(50, size=sum(lengths)).astype(np.uint16)
    offsets = np.cumsum([0, *lengths])[:-1]
    table = {
        "id": [f"d{i}" for i in range(len(lengths))],
        "source": "text",
        "offset": offsets,
        "n_tokens": lengths,
        "n_bytes": [3 * n for n in lengths],
    }
    return Stream(tokens, pd.DataFrame(table))


def by_hand(model: Any, stream: Stream) -> dict[str, list[float]]:
    """The expected sums, computed one token at a time."""
    context = model.params.context_length
    tokens = [int(t) for t in stream.tokens]
    document = [i for i, n in enumerate(stream.documents["n_tokens"]) for _ in range(n)]
    sums: dict[str, list[float]] = {
        "nats": [0.0] * len(stream.documents),
        "n_tokens": [0.0] * len(stream.documents),
        "correct": [0.0] * len(stream.documents),
        "by_position": [0.0] * context,
        "n_by_position": [0.0] * context,
        "confidence": [0.0] * CONFIDENCE_BINS,
        "n_by_confidence": [0.0] * CONFIDENCE_BINS,
    }
    for target in range(1, len(tokens)):
        start = (target - 1) // context * context
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:target]]))[0, -1]
        nats = -logits.log_softmax(-1)[tokens[target]].item()
        sums["nats"][document[target]] += nats
        sums["correct"][document[target]] += int(logits.argmax()) == tokens[target]
        sums["n_tokens"][document[target]] += 1
        sums["by_position"][(target - 1) % context] += nats
        sums["n_by_position"][(target - 1) % context] += 1
        confidence = logits.softmax(-1).max().item()
        sums["confidence"][int(confidence * CONFIDENCE_BINS)] += confidence
        sums["n_by_confidence"][int(confidence * CONFIDENCE_BINS)] += 1
    return sums


@pytest.mark.parametrize("windows_at_once", [1, 2, 100])
@pytest.mark.parametrize("lengths", [(1, 20, 3, 40), (17,), (16, 1), (2,), (33, 32), (5, 1, 1)])
def test_against_a_loop(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], windows_at_once: int) -> None:
    """Documents cross windows, the last window has any length, and any number of windows is scored at once."""
    model, stream = tiny.network(), stream_of(*lengths)
    monkeypatch.setattr(scoring, "_MAX_LOGITS", windows_at_once * 16 * model.vocab_size)
    reported: list[int] = []
    scores, expected = score(model, stream, advance=reported.append), by_hand(model, stream)
    nats, hits, n_tokens = scores.by_document
    assert n_tokens.tolist() == expected["n_tokens"]
    assert scores.by_position[2].tolist() == expected["n_by_position"]
    assert hits.tolist() == expected["correct"]
    np.testing.assert_allclose(nats, expected["nats"], rtol=1e-5)
    np.testing.assert_allclose(scores.by_position[0], expected["by_position"], rtol=1e-5)
    assert scores.by_position[1].sum() == scores.by_confidence[1].sum() == sum(expected["correct"])
    np.testing.assert_allclose(scores.by_confidence[0], expected["confidence"], rtol=1e-5)
    assert scores.by_confidence[2].tolist() == expected["n_by_confidence"]
    assert n_tokens.sum() == sum(reported) == len(stream.tokens) - 1
    assert nats.sum() == pytest.approx(scores.by_position[0].sum())


@pytest.mark.parametrize("n_parts", [2, 3, 7])
def test_the_scores_of_all_parts_add_up_to_those_of_the_stream(monkeypatch: pytest.MonkeyPatch, n_parts: int) -> None:
    """All parts report the same turns, even parts without a batch in the last turn."""
    model, stream = tiny.network(), stream_of(1, 40, 3, 60)
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 16 * model.vocab_size)
    whole, reported = score(model, stream), [[] for _ in range(n_parts)]
    parts = [score(model, stream, part=(i, n_parts), advance=reported[i].append) for i in range(n_parts)]
    for name, expected in vars(whole).items():
        np.testing.assert_allclose(sum(getattr(part, name) for part in parts), expected, rtol=1e-12)
    assert all(part.by_document[2].sum() > 0 for part in parts)
    assert all(turns == reported[0] for turns in reported)
    assert sum(reported[0]) == 103


@pytest.mark.parametrize("lengths", [(), (1,)])
def test_a_stream_of_less_than_two_tokens_has_no_scores(lengths: tuple[int, ...]) -> None:
    scores = score(tiny.network(), stream_of(*lengths))
    assert scores.by_document[0].tolist() == [0.0] * len(lengths)


def test_scoring_changes_neither_training_mode_nor_random_generator() -> None:
    model = tiny.network(dropout=0.5).train()
    before = torch.get_rng_state()
    first, second = (score(model, stream_of(30)) for _ in range(2))
    assert first.by_document.tolist() == second.by_document.tolist()
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_scoring_a_stream_from_disk(toy_split: Path) -> None:
    stream = open_stream(toy_split, "test")
    scores: Scores = score(tiny.network(300), stream)
    expected = stream.documents["n_tokens"].to_numpy(dtype=float)
    expected[0] -= 1  # the first token of the stream is not scored
    assert scores.by_document[2].tolist() == expected.tolist()

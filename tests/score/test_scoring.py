"""Scoring of every token but the first, exactly once, compared with a loop over single tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from gptpipe.formats.streams import Stream, open_stream
from gptpipe.score import scoring
from gptpipe.score.scoring import CONFIDENCE_BINS, Scores, Scoring, score


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


POSITIONS = (range(1), range(1, 2), range(2, 4), range(4, 8), range(8, 16))  # groups in a window of 16
END = 49  # the end-of-text token of streams of whole documents


def ended(stream: Stream) -> Stream:
    """The same stream with an end-of-text token at the end of each document, and nowhere else."""
    tokens = np.where(stream.tokens == END, 0, stream.tokens).astype(np.uint16)
    tokens[(stream.documents["offset"] + stream.documents["n_tokens"]).to_numpy() - 1] = END
    return Stream(tokens, stream.documents)


def by_hand(model: Any, stream: Stream, *, masked: bool = False) -> dict[str, list[float]]:
    """The expected sums, computed one token at a time.

    If `masked`, the model sees nothing but the window's part of the document that the last input token is from.
    """
    context = model.params.context_length
    tokens = [int(t) for t in stream.tokens]
    document = [i for i, n in enumerate(stream.documents["n_tokens"]) for _ in range(n)]
    sums: dict[str, list[float]] = {
        "nats": [0.0] * len(stream.documents),
        "n_tokens": [0.0] * len(stream.documents),
        "correct": [0.0] * len(stream.documents),
        "by_position": [0.0] * 5,
        "n_by_position": [0.0] * 5,
        "confidence": [0.0] * CONFIDENCE_BINS,
        "n_by_confidence": [0.0] * CONFIDENCE_BINS,
    }
    for target in range(1, len(tokens)):
        start = (target - 1) // context * context
        if masked:
            start = max(start, int(stream.documents["offset"][document[target - 1]]))
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:target]]))[0, -1]
        nats = -logits.log_softmax(-1)[tokens[target]].item()
        sums["nats"][document[target]] += nats
        sums["correct"][document[target]] += int(logits.argmax()) == tokens[target]
        sums["n_tokens"][document[target]] += 1
        group = POSITIONS.index(next(p for p in POSITIONS if (target - 1) % context in p))
        sums["by_position"][group] += nats
        sums["n_by_position"][group] += 1
        confidence = logits.softmax(-1).max().item()
        sums["confidence"][int(confidence * CONFIDENCE_BINS)] += confidence
        sums["n_by_confidence"][int(confidence * CONFIDENCE_BINS)] += 1
    return sums


@pytest.mark.parametrize("windows_at_once", [1, 2, 100])
@pytest.mark.parametrize("lengths", [(1, 20, 3, 40), (17,), (16, 1), (2,), (33, 32), (5, 1, 1)])
def test_against_a_loop(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], windows_at_once: int
) -> None:
    """Documents cross windows, the last window has any length, and any number of windows is scored at once."""
    model, stream = tiny.network(), stream_of(*lengths)
    monkeypatch.setattr(scoring, "_MAX_LOGITS", windows_at_once * 16 * model.vocab_size)
    reported: list[int] = []
    scores, expected = (
        score(model, stream, with_positions=True, advance=reported.append),
        by_hand(model, stream),
    )
    nats, hits, n_tokens = scores.by_document
    assert n_tokens.tolist() == expected["n_tokens"]
    by_position = scores.by_position.sum(axis=2)
    np.testing.assert_allclose(scores.by_position.sum(axis=1), scores.by_document)
    assert by_position[2].tolist() == expected["n_by_position"]
    assert hits.tolist() == expected["correct"]
    np.testing.assert_allclose(nats, expected["nats"], rtol=1e-5)
    np.testing.assert_allclose(by_position[0], expected["by_position"], rtol=1e-5)
    assert by_position[1].sum() == scores.by_confidence[1].sum() == sum(expected["correct"])
    np.testing.assert_allclose(scores.by_confidence[0], expected["confidence"], rtol=1e-5)
    assert scores.by_confidence[2].tolist() == expected["n_by_confidence"]
    assert n_tokens.sum() == sum(reported) == len(stream.tokens) - 1
    assert nats.sum() == pytest.approx(by_position[0].sum())


@pytest.mark.parametrize("windows_at_once", [1, 2, 100])
@pytest.mark.parametrize("lengths", [(1, 20, 3, 40), (17,), (5, 1, 1), (3,) * 20])
def test_a_model_trained_with_document_masking_is_scored_within_documents(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], windows_at_once: int
) -> None:
    """Windows and scored tokens stay the same. Rotary positions are relative, so the loop needs no mask."""
    model, stream = tiny.network(), ended(stream_of(*lengths))
    monkeypatch.setattr(scoring, "_MAX_LOGITS", windows_at_once * 16 * model.vocab_size)
    scores = score(model, stream, Scoring(end_of_text=END), with_positions=True)
    expected = by_hand(model, stream, masked=True)
    nats, hits, n_tokens = scores.by_document
    assert n_tokens.tolist() == expected["n_tokens"]
    assert hits.tolist() == expected["correct"]
    np.testing.assert_allclose(nats, expected["nats"], rtol=1e-5)
    np.testing.assert_allclose(scores.by_position[0].sum(axis=1), expected["by_position"], rtol=1e-5)


def test_the_masks_of_a_batch_are_as_large_as_its_logits_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a context of 16 and 4 tokens, a mask has 16 values per token, and logits have 4."""
    model, stream = tiny.network(4), stream_of(65)
    stream.tokens[:] %= 4
    sizes = []
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 2 * 16 * 16)
    monkeypatch.setattr(scoring, "document_mask", lambda windows, _: sizes.append(windows.shape))
    score(model, stream, Scoring(end_of_text=3))
    assert sizes == [(2, 16), (2, 16)]


@pytest.mark.parametrize("how", [Scoring(), Scoring(torch.bfloat16, 7)])
def test_how_a_model_is_scored_survives_being_written_down(how: Scoring) -> None:
    assert Scoring.described(json.loads(json.dumps(how.describe())), 7) == how


@pytest.mark.parametrize("n_parts", [2, 3, 7])
def test_the_scores_of_all_parts_add_up_to_those_of_the_stream(
    monkeypatch: pytest.MonkeyPatch, n_parts: int
) -> None:
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

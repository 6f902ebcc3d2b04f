"""Figures from sums, by hand: two documents of 4 and 6 tokens, 8 and 12 bytes."""

import math

import numpy as np
import pandas as pd
import pytest

from gptpipe.score.metrics import calibration_error, calibration_table, figures, figures_by_source, ratio

DOCUMENTS = pd.DataFrame({"source": ["b", "a"], "n_bytes": [8, 12]})
SCORES = np.array([[10.0, 6.0], [1.0, 3.0], [4.0, 6.0]])  # nats, hits, tokens
BY_CONFIDENCE = np.array([[0.0, 1.0, 0.0, 4.5], [0.0, 2.0, 0.0, 4.0], [0.0, 5.0, 0.0, 5.0]])


def test_figures() -> None:
    found = figures(SCORES, DOCUMENTS)
    assert found["loss"] == pytest.approx(1.6)  # 16 nats over 10 tokens
    # residuals 10 - 1.6 * 4 = 3.6 and 6 - 1.6 * 6 = -3.6; sqrt(2 / 1 * 2 * 3.6^2) / 10
    assert found["loss_standard_error"] == pytest.approx(0.72)
    assert found["perplexity"] == pytest.approx(math.exp(1.6))
    assert found["perplexity_standard_error"] == pytest.approx(math.exp(1.6) * 0.72)
    assert found["bits_per_byte"] == pytest.approx(16 / math.log(2) / 20)
    assert found["token_accuracy"] == pytest.approx(0.4)
    assert found["token_accuracy_standard_error"] == pytest.approx(math.sqrt(2 * 2 * 0.6**2) / 10)
    assert (found["n_tokens"], found["n_bytes"], found["n_documents"]) == (10, 20, 2)


def test_figures_by_source_are_those_of_its_documents() -> None:
    found = figures_by_source(SCORES, DOCUMENTS)
    assert list(found) == ["a", "b"]
    assert found["a"]["loss"] == pytest.approx(1.0)
    assert found["b"]["loss"] == pytest.approx(2.5)
    assert found["a"]["bits_per_byte"] == pytest.approx(6 / math.log(2) / 12)
    assert found["a"]["loss_standard_error"] == 0.0  # of one document it is not known


def test_the_standard_error_is_the_spread_of_the_ratio_over_samples() -> None:
    """Against the standard deviation of the ratio among 2,000 samples of 200 documents."""
    rng = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(2000):
        tokens = rng.integers(1, 50, size=200).astype(float)
        value, error = ratio(tokens * rng.normal(3.0, 1.0, size=200), tokens)
        found.append(value)
        errors.append(error)
    assert np.mean(found) == pytest.approx(3.0, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.05)


def test_a_ratio_of_nothing_is_nothing() -> None:
    assert ratio(np.zeros(0), np.zeros(0)) == (0.0, 0.0)


def test_calibration() -> None:
    """Sure at 0.2 and right at 0.4 in five tokens, sure at 0.9 and right at 0.8 in the other five."""
    table = calibration_table(BY_CONFIDENCE)
    assert table.to_numpy().tolist() == [[0.2, 0.4, 5.0], [0.9, 0.8, 5.0]]
    assert calibration_error(table) == pytest.approx(0.15)
    assert calibration_error(table[:0]) == 0.0


def test_a_hopeless_loss_has_a_finite_perplexity() -> None:
    """JSON knows no infinity."""
    hopeless = np.array([[1e6], [0.0], [1.0]])
    assert math.isfinite(figures(hopeless, DOCUMENTS[:1])["perplexity"])

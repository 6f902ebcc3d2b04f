"""Metrics from sums, calculated by hand: two documents of 4 and 6 tokens, 8 and 12 bytes."""

import math

import numpy as np
import pandas as pd
import pytest

from gptpipe.score.metrics import (
    calibration_error,
    calibration_table,
    compute_metrics,
    metrics_by_source,
    ratio,
)

DOCUMENTS = pd.DataFrame({"source": ["b", "a"], "n_bytes": [8, 12]})
SCORES = np.array([[10.0, 6.0], [1.0, 3.0], [4.0, 6.0]])  # nats, hits, tokens
BY_CONFIDENCE = np.array([[0.0, 1.0, 0.0, 4.5], [0.0, 2.0, 0.0, 4.0], [0.0, 5.0, 0.0, 5.0]])


def test_metrics_of_two_documents() -> None:
    metrics = compute_metrics(SCORES, DOCUMENTS)
    assert metrics["loss"] == pytest.approx(1.6)  # 16 nats over 10 tokens
    # residuals 10 - 1.6 * 4 = 3.6 and 6 - 1.6 * 6 = -3.6; sqrt(2 / 1 * 2 * 3.6^2) / 10
    assert metrics["loss_standard_error"] == pytest.approx(0.72)
    assert metrics["perplexity"] == pytest.approx(math.exp(1.6))
    assert metrics["perplexity_standard_error"] == pytest.approx(math.exp(1.6) * 0.72)
    assert metrics["bits_per_byte"] == pytest.approx(16 / math.log(2) / 20)
    assert metrics["token_accuracy"] == pytest.approx(0.4)
    assert metrics["token_accuracy_standard_error"] == pytest.approx(math.sqrt(2 * 2 * 0.6**2) / 10)
    assert (metrics["n_tokens"], metrics["n_bytes"], metrics["n_documents"]) == (10, 20, 2)


def test_metrics_of_a_source_cover_its_documents_only() -> None:
    by_source = metrics_by_source(SCORES, DOCUMENTS)
    assert list(by_source) == ["a", "b"]
    assert by_source["a"]["loss"] == pytest.approx(1.0)
    assert by_source["b"]["loss"] == pytest.approx(2.5)
    assert by_source["a"]["bits_per_byte"] == pytest.approx(6 / math.log(2) / 12)
    assert by_source["a"]["loss_standard_error"] == 0.0  # unknown for a single document


def test_the_standard_error_is_the_standard_deviation_of_the_ratio_over_samples() -> None:
    """Against the standard deviation of the ratio among 2,000 samples of 200 documents."""
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(2000):
        tokens = rng.integers(1, 50, size=200).astype(float)
        value, error = ratio(tokens * rng.normal(3.0, 1.0, size=200), tokens)
        values.append(value)
        errors.append(error)
    assert np.mean(values) == pytest.approx(3.0, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.05)


def test_a_ratio_of_empty_arrays_is_0() -> None:
    assert ratio(np.zeros(0), np.zeros(0)) == (0.0, 0.0)


def test_calibration_table_and_error() -> None:
    """Five tokens have confidence 0.2 and accuracy 0.4, five others confidence 0.9 and accuracy 0.8."""
    table = calibration_table(BY_CONFIDENCE)
    assert table.to_numpy().tolist() == [[0.2, 0.4, 5.0], [0.9, 0.8, 5.0]]
    assert calibration_error(table) == pytest.approx(0.15)
    assert calibration_error(table[:0]) == 0.0


def test_a_huge_loss_has_a_finite_perplexity() -> None:
    """JSON has no infinity."""
    scores = np.array([[1e6], [0.0], [1.0]])
    assert math.isfinite(compute_metrics(scores, DOCUMENTS[:1])["perplexity"])

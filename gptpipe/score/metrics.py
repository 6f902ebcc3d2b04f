"""Metrics computed from sums of nats, each with its standard error."""

import math

import numpy as np
import pandas as pd

from gptpipe.score.scoring import Array

Metrics = dict[str, float]
VALIDATION_METRICS = ("loss", "perplexity", "bits_per_byte", "token_accuracy")  # that a training logs


def compute_metrics(scores: Array, documents: pd.DataFrame) -> Metrics:
    """Loss, perplexity, bits per byte and token accuracy; `scores` are columns of `by_document`.

    `loss` is in nats per token; `bits_per_byte` is the sum of nats / ln 2 / UTF-8 bytes of the documents.
    Standard errors treat documents, not tokens, as independent.
    """
    nats, hits, n_tokens = scores
    n_bytes = documents["n_bytes"].to_numpy(dtype=np.float64)
    loss, loss_error = ratio(nats, n_tokens)
    perplexity = math.exp(min(loss, 700.0))  # finite, because JSON has no infinity
    values_and_errors = {
        "loss": (loss, loss_error),
        "perplexity": (perplexity, perplexity * loss_error),
        "bits_per_byte": ratio(nats / math.log(2), n_bytes),
        "token_accuracy": ratio(hits, n_tokens),
    }
    metrics: Metrics = {}
    for name, (value, error) in values_and_errors.items():
        metrics |= {name: value, f"{name}_standard_error": error}
    return {
        **metrics,
        "n_tokens": int(n_tokens.sum()),
        "n_bytes": int(n_bytes.sum()),
        "n_documents": len(documents),
    }


def metrics_by_source(scores: Array, documents: pd.DataFrame) -> dict[str, Metrics]:
    """The metrics of the documents of each source."""
    metrics: dict[str, Metrics] = {}
    for source in sorted(documents["source"].unique()):
        is_from_source = (documents["source"] == source).to_numpy()
        metrics[str(source)] = compute_metrics(scores[:, is_from_source], documents[is_from_source])
    return metrics


def calibration_table(by_confidence: Array) -> pd.DataFrame:
    """Mean confidence and accuracy of the tokens in each bin of confidence; `by_confidence` as in `Scores`.

    Confidence is the probability of the most probable token.
    """
    confidence, hits, n_tokens = by_confidence[:, by_confidence[2] > 0]
    return pd.DataFrame(
        {"confidence": confidence / n_tokens, "accuracy": hits / n_tokens, "n_tokens": n_tokens}
    )


def calibration_error(table: pd.DataFrame) -> float:
    """Expected calibration error: mean gap of accuracy and confidence (Guo et al., 2017, arXiv:1706.04599)."""
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((gaps * table["n_tokens"]).sum() / max(1.0, table["n_tokens"].sum()))


def ratio(numerators: Array, denominators: Array) -> tuple[float, float]:
    """sum(numerators) / sum(denominators), and its standard error over the units, here documents.

    The error is linearised for a ratio of means (Cochran, Sampling Techniques, 1977, section 6.4). With a
    single unit it is unknown and returned as 0.
    """
    total = denominators.sum()
    if total == 0:
        return 0.0, 0.0
    value = numerators.sum() / total
    n = len(numerators)
    if n < 2:
        return float(value), 0.0
    residuals = numerators - value * denominators
    return float(value), float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / total)

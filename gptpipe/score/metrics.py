"""From sums of nats to the figures that people compare, each with its standard error."""

import math

import numpy as np
import pandas as pd

from gptpipe.score.scoring import Array

Figures = dict[str, float]


def figures(scores: Array, documents: pd.DataFrame) -> Figures:
    """Loss, perplexity, bits per byte and token accuracy of a stream, or of some of its documents, by their scores.

    `loss` is nats per token, `bits_per_byte` the sum of nats / ln 2 / the documents' UTF-8 bytes. Standard errors
    treat documents as the independent units, for tokens of one text are not.
    """
    nats, hits, n_tokens = scores
    n_bytes = documents["n_bytes"].to_numpy(dtype=np.float64)
    loss, loss_error = ratio(nats, n_tokens)
    perplexity = math.exp(min(loss, 700.0))
    with_errors = {
        "loss": (loss, loss_error),
        "perplexity": (perplexity, perplexity * loss_error),
        "bits_per_byte": ratio(nats / math.log(2), n_bytes),
        "token_accuracy": ratio(hits, n_tokens),
    }
    found: Figures = {}
    for name, (value, error) in with_errors.items():
        found |= {name: value, f"{name}_standard_error": error}
    return {**found, "n_tokens": int(n_tokens.sum()), "n_bytes": int(n_bytes.sum()), "n_documents": len(documents)}


def figures_by_source(scores: Array, documents: pd.DataFrame) -> dict[str, Figures]:
    """The same figures for the documents of each source."""
    chosen = {str(s): (documents["source"] == s).to_numpy() for s in sorted(documents["source"].unique())}
    return {source: figures(scores[:, rows], documents[rows]) for source, rows in chosen.items()}


def calibration_table(by_confidence: Array) -> pd.DataFrame:
    """How sure the model was of its most probable token, and how often it was right, by tenths of that confidence."""
    confidence, hits, n_tokens = by_confidence[:, by_confidence[2] > 0]
    return pd.DataFrame({"confidence": confidence / n_tokens, "accuracy": hits / n_tokens, "n_tokens": n_tokens})


def calibration_error(table: pd.DataFrame) -> float:
    """Expected calibration error (Guo et al., 2017, arXiv:1706.04599): the mean gap of accuracy and confidence."""
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((gaps * table["n_tokens"]).sum() / max(1.0, table["n_tokens"].sum()))


def ratio(numerators: Array, denominators: Array) -> tuple[float, float]:
    """sum(numerators) / sum(denominators), and its standard error over units.

    The error is the linearised one of a ratio of means (Cochran, Sampling Techniques, 1977, section 6.4); with a
    single unit it is not known and given as 0.
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

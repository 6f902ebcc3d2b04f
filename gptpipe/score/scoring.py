"""Score every token of a stream but the first, each once, in consecutive windows of the context length.

The last window may be shorter. Nothing is sampled, and the batch size affects only rounding. A model is scored
as it was trained: in the same precision, and if its attention stayed inside documents in training, it does so
here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from gptpipe.base.manifest import MANIFEST, Manifest
from gptpipe.formats.streams import Stream
from gptpipe.model.device import autocast
from gptpipe.model.gpt import GPT, document_mask
from gptpipe.shell.errors import IntegrityError

CONFIDENCE_BINS = 10  # of equal width, from 0 to 1
_MAX_LOGITS = 1 << 24  # logits computed in one forward pass: 64 MB in float32

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scoring:
    """How a model is scored. Stage train writes it down with the model, and stage evaluate does the same."""

    precision: torch.dtype = torch.float32  # of matrix products
    # If given, a token attends only to tokens of its own document, which ends with this.
    end_of_text: int | None = None

    def describe(self) -> dict[str, str | bool]:
        """The form in which manifests and reports contain it."""
        return {
            "precision": str(self.precision).removeprefix("torch."),
            "document_masking": self.end_of_text is not None,
        }

    @classmethod
    def described(cls, description: dict[str, Any], end_of_text: int) -> "Scoring":
        """The inverse of `describe`. Raises KeyError for a precision that no training has."""
        precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[description["precision"]]
        return cls(precision, end_of_text if description["document_masking"] else None)


def scoring_of(folder: Path, manifest: Manifest, end_of_text: int) -> Scoring:
    """How the training scored the model in `folder`. Raises IntegrityError if its manifest does not say it."""
    try:
        return Scoring.described(manifest.counts["scoring"], end_of_text)
    except (KeyError, TypeError) as error:
        raise IntegrityError(
            f"{folder / MANIFEST}: it does not say how the model was scored in training; "
            "run `dvc repro -f train`"
        ) from error


def scoring_in_words(description: dict[str, Any]) -> str:
    """The result of `Scoring.describe` as the end of a sentence, for pages and tags."""
    reach = "document" if description["document_masking"] else "window"
    return f"in {description['precision']}; a token attends to its own {reach} only"


@dataclass(frozen=True)
class Scores:
    """Sums over tokens. Each array has three rows: negative log-likelihoods in nats, hits, and tokens.

    A token is a hit if it is the model's most probable token.
    """

    by_document: Array  # (3, documents)
    by_position: Array  # (3, groups of positions in the window, documents); of no group unless asked for
    by_confidence: Array  # (3, CONFIDENCE_BINS); row 0 sums the probability of the most probable token instead


def score(
    model: GPT,
    stream: Stream,
    scoring: Scoring = Scoring(),
    *,
    part: tuple[int, int] = (0, 1),
    with_positions: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Score a stream, or part i of n of it: `part` is (i, n). The scores of all parts add up.

    The windows and the scored tokens are the same for any `scoring`. The parts take turns of one batch each.
    After each turn, `advance` is called with the number of tokens that all parts together score in it. Memory:
    the logits and the mask of one batch, and three numbers per document; `with_positions`, also three for each
    document and group of positions.
    """
    context = model.params.context_length
    ends = (stream.documents["offset"] + stream.documents["n_tokens"]).to_numpy()
    group_of_position = position_groups(context)
    n_groups = int(group_of_position[-1]) + 1 if with_positions else 0
    shapes = ((len(ends),), (n_groups, len(ends)), (CONFIDENCE_BINS,))
    scores = Scores(*(np.zeros((3, *shape)) for shape in shapes))
    n_targets = max(0, len(stream.tokens) - 1)
    # Of the logits, or of the mask if it is wider.
    width = model.vocab_size if scoring.end_of_text is None else max(model.vocab_size, context)
    batches = _batches(n_targets, context, width)
    i_part, n_parts = part
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(batches), n_parts):
            turn = batches[i : i + n_parts]
            if i_part < len(turn):
                start, end = turn[i_part]
                nats, hits, confidence = _score_windows(model, stream.tokens[start : end + 1], scoring)
                document = np.searchsorted(ends, np.arange(start + 1, end + 1), side="right")
                confidence_bin = np.minimum(confidence * CONFIDENCE_BINS, CONFIDENCE_BINS - 1).astype(np.int64)
                _add(scores.by_document, document, nats, hits)
                if with_positions:
                    group = group_of_position[np.arange(end - start) % context]
                    for row, values in zip(scores.by_position, (nats, hits, np.ones_like(nats)), strict=True):
                        np.add.at(row, (group, document), values)
                _add(scores.by_confidence, confidence_bin, confidence, hits)
            advance(turn[-1][1] - turn[0][0])
    finally:
        model.train(was_training)
    return scores


def position_groups(context: int) -> npt.NDArray[np.int64]:
    """The group of each position in a window of `context` tokens, by powers of two: 0, 1, 2-3, 4-7, ..."""
    return np.array([position.bit_length() for position in range(context)], dtype=np.int64)


def _batches(n_targets: int, context: int, width: int) -> list[tuple[int, int]]:
    """First and last + 1 position of the tokens scored at once: whole windows, then the shorter last window.

    `width` is the number of values that each token needs at once.
    """
    n_in_full_windows = n_targets // context * context
    n_at_once = max(1, _MAX_LOGITS // (context * width)) * context
    return list(pairwise(sorted({*range(0, n_in_full_windows, n_at_once), n_in_full_windows, n_targets})))


def _add(sums: Array, columns: npt.NDArray[np.int64], first: Array, hits: Array) -> None:
    """Add the values of each token to its column of `sums`."""
    for row, values in zip(sums, (first, hits, np.ones(len(columns))), strict=True):
        row += np.bincount(columns, weights=values, minlength=len(row))


@torch.no_grad()
def _score_windows(
    model: GPT, tokens: npt.NDArray[np.unsignedinteger], scoring: Scoring
) -> tuple[Array, Array, Array]:
    """Score tokens[1:] in windows of equal length: nats, whether the top token is right, its probability."""
    chunk = torch.from_numpy(tokens.astype(np.int64)).to(model.embedding.weight.device)
    targets = chunk[1:]
    n_windows = max(1, len(targets) // model.params.context_length)
    windows = chunk[:-1].view(n_windows, -1)  # (B, T)
    mask = None if scoring.end_of_text is None else document_mask(windows, scoring.end_of_text)
    with autocast(chunk.device, scoring.precision):
        logits = model.head(model.hidden(windows, mask=mask)).flatten(0, 1)  # (B * T, V)
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    best = logits.argmax(dim=-1)
    lead = (logits.gather(-1, best[:, None]) - logits.gather(-1, targets[:, None]))[:, 0].float()
    confidence = (lead - nats).exp().clamp(max=1)
    losses, hits, confidences = (x.double().cpu().numpy() for x in (nats, best == targets, confidence))
    return losses, hits, confidences

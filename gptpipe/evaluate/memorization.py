"""Memorization: how much of what the model writes without a prompt is copied from its training text.

The measure is the share of generated runs of 50 tokens that occur in the training text (Lee et al., 2022,
arXiv:2107.06499, section 6.1). Tokens, not words or characters: the training text is a stream of tokens, so the
search is exact and the same for every language. The same share of the held-out text is the reference: licences
and other formulas occur everywhere, and a model that repeats them has not memorized a document.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from gptpipe.base.hashing import mix64
from gptpipe.formats.streams import Stream
from gptpipe.model.generate import Batch, Sampling, TokenSequence
from gptpipe.model.gpt import GPT
from gptpipe.score.metrics import ratio

RUN_TOKENS = 50
N_TEXTS = 64
TEXT_TOKENS = 128
TOP_K = 50  # the model samples from its most probable tokens, at temperature 1

_AT_ONCE = 32  # texts generated together; each needs a cache of keys and values
_MAX_HELD_OUT_TOKENS = 1 << 20  # of the reference
_CHUNK = 1 << 16  # runs of the training text hashed at once: their hashes fit into the processor's cache
_BASE = np.uint64(0xD6E8FEB86659FD93)  # of a polynomial modulo 2**64; odd

Hashes = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.unsignedinteger]


def memorization(model: GPT, end_of_text: int, train: Stream, held_out: Stream, seed: int) -> dict[str, Any]:
    """The share of generated runs that occur in `train`, with its standard error over the generated texts.

    A run inside one document counts, one across the end of a document does not. The share is None, with a
    reason, if there is no run. Takes about 0.1 seconds for each million tokens of `train`.
    """
    texts = generate_texts(model, end_of_text, seed)
    runs = [runs_of(text, end_of_text) for text in texts]
    n_runs = np.array([len(hashes) for hashes in runs], dtype=np.float64)
    if not n_runs.any():
        return {"share": None, "reason": f"no generated document has {RUN_TOKENS} tokens"}
    of_held_out = runs_of(held_out.tokens[:_MAX_HELD_OUT_TOKENS], end_of_text)
    known = _known(np.unique(np.concatenate([*runs, of_held_out])), train.tokens)
    n_known = np.array([np.isin(hashes, known).sum() for hashes in runs], dtype=np.float64)
    share, error = ratio(n_known, n_runs)
    return {
        "share": share,
        "share_standard_error": error,
        "share_of_held_out": float(np.isin(of_held_out, known).mean()) if len(of_held_out) else None,
        "n_runs": int(n_runs.sum()),
        "n_texts": len(texts),
    }


def generate_texts(model: GPT, end_of_text: int, seed: int) -> list[Tokens]:
    """Texts of `TEXT_TOKENS` tokens, or of the model's context if it is shorter, without a prompt."""
    n_tokens = min(TEXT_TOKENS, model.params.context_length - 1)
    texts: list[Tokens] = []
    for first in range(0, N_TEXTS, _AT_ONCE):
        batch = Batch(model, _AT_ONCE, 1 + n_tokens)
        for i in range(first, first + _AT_ONCE):
            batch.add(TokenSequence([end_of_text], Sampling(top_k=TOP_K, seed=(seed + i) % 2**63)))
        for _ in range(n_tokens):
            batch.step()
        texts += [np.array(sequence.tokens[1:], np.uint32) for sequence in batch.sequences]
    return texts


def runs_of(tokens: Tokens, end_of_text: int) -> Hashes:
    """The hash of each run of `RUN_TOKENS` tokens that contains no end of a document."""
    n_runs = max(0, len(tokens) - RUN_TOKENS + 1)
    n_ends = np.concatenate([[0], np.cumsum(tokens == end_of_text)])
    is_inside = n_ends[RUN_TOKENS:] == n_ends[:n_runs]
    return np.asarray(_hash_runs(tokens)[is_inside])


def _hash_runs(tokens: Tokens) -> Hashes:
    """The hash of each run: a polynomial whose coefficients are the tokens, each mixed to 64 bits."""
    mixed = mix64(tokens.astype(np.uint64) + np.uint64(1))
    hashes = np.zeros(max(0, len(tokens) - RUN_TOKENS + 1), np.uint64)
    for i in range(RUN_TOKENS):
        hashes *= _BASE
        hashes += mixed[i : i + len(hashes)]
    return hashes


def _known(hashes: Hashes, train: Tokens) -> Hashes:
    """Those of the sorted `hashes` that a run of `train` has. It may contain the end of a document."""
    is_known = np.zeros(len(hashes), np.bool_)
    for start in range(0, len(train) - RUN_TOKENS + 1, _CHUNK):
        of_chunk = _hash_runs(train[start : start + _CHUNK + RUN_TOKENS - 1])
        places = np.searchsorted(hashes, of_chunk).clip(max=len(hashes) - 1)
        is_known[places[hashes[places] == of_chunk]] = True
    return hashes[is_known]

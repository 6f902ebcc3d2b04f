"""The share of generated runs of tokens that occur in the training text, compared with a search by text."""

import numpy as np
import pandas as pd
import pytest
import tiny

from gptpipe.evaluate import memorization as module
from gptpipe.evaluate.memorization import RUN_TOKENS, generate_texts, memorization, runs_of
from gptpipe.formats.streams import Stream

END = 0


def stream_of(*tokens: int) -> Stream:
    return Stream(np.array(tokens, np.uint16), pd.DataFrame())


def random_tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 50, size=n).tolist()


@pytest.mark.parametrize("chunk", [1, 64, 1 << 16])
def test_shares_equal_those_of_a_search_by_text(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts are generated: one has 7 of its 31 runs from the training text, one has none of its 11."""
    copied = random_tokens(RUN_TOKENS + 6, 1)
    texts = [[*random_tokens(12, 2), *copied, *random_tokens(12, 3)], random_tokens(RUN_TOKENS + 10, 4)]
    train = stream_of(*random_tokens(100, 5), END, *copied, END, *random_tokens(100, 6))
    held_out = stream_of(*random_tokens(30, 7), END, *copied[:RUN_TOKENS], *random_tokens(3, 8), END)
    monkeypatch.setattr(module, "generate_texts", lambda *_: [np.array(text) for text in texts])
    monkeypatch.setattr(module, "_CHUNK", chunk)

    def is_known(run: list[int]) -> bool:
        text = ",".join(map(str, train.tokens))
        return f",{','.join(map(str, run))}," in f",{text},"

    runs = [[text[i : i + RUN_TOKENS] for i in range(len(text) - RUN_TOKENS + 1)] for text in texts]
    assert [sum(map(is_known, of_text)) for of_text in runs] == [7, 0]
    result = memorization(tiny.network(), END, train, held_out, seed=0)
    assert result["share"] == 7 / 42
    assert result["n_runs"] == 42
    assert result["n_texts"] == 2
    # Residuals of both texts: 7 - 31 / 6 and -11 / 6, so 2 / 1 * 2 * (11 / 6) ** 2 under the root.
    assert result["share_standard_error"] == pytest.approx(2 * 11 / 6 / 42)
    assert result["share_of_held_out"] == 0.25  # of 4 runs


def test_a_run_does_not_cross_the_end_of_a_document() -> None:
    text = np.array([*random_tokens(RUN_TOKENS - 1, 1), END, *random_tokens(RUN_TOKENS + 1, 2)])
    assert len(runs_of(text, END)) == 2
    assert len(runs_of(text[:RUN_TOKENS], END)) == 0
    assert len(runs_of(text[: RUN_TOKENS - 2], END)) == 0


def test_a_model_with_a_short_context_has_no_run_and_a_reason() -> None:
    train = stream_of(*random_tokens(100, 1))
    result = memorization(tiny.network(context_length=16), END, train, train, seed=0)
    assert result == {"share": None, "reason": "no generated document has 50 tokens"}


def test_texts_are_repeatable_and_differ() -> None:
    model = tiny.network(context_length=12)
    texts = generate_texts(model, END, seed=5)
    assert len(texts) == 64
    assert {len(text) for text in texts} == {11}
    assert len({text.tobytes() for text in texts}) == 64
    assert np.array_equal(texts, generate_texts(model, END, seed=5))
    assert not np.array_equal(texts, generate_texts(model, END, seed=6))
    generate_texts(model, END, seed=2**63 - 1)


def test_a_text_that_the_model_generates_is_found_in_the_training_text() -> None:
    model = tiny.network(context_length=128)
    texts = generate_texts(model, END, seed=5)
    n_runs = [len(runs_of(text, END)) for text in texts]
    longest = texts[n_runs.index(max(n_runs))]
    train = stream_of(*random_tokens(100, 1), *longest.tolist())
    result = memorization(model, END, train, stream_of(*random_tokens(60, 1)), seed=5)
    assert result["share"] == max(n_runs) / sum(n_runs) > 0

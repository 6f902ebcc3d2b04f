"""Small corpora and the stages before the one under test."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from sections import split_params, tokenize_params

from gptpipe.config import CollectParams, SplitParams, TokenizeParams
from gptpipe.corpus.collect import collect


@pytest.fixture
def corpus(tmp_path: Path, collect_params: Callable[..., CollectParams]) -> Callable[[Iterable[str]], Path]:
    """Makes a data/raw of one-line documents."""

    def make(lines: Iterable[str]) -> Path:
        (tmp_path / "corpus.txt").write_text("\n".join(lines))
        source = {"kind": "text", "paths": (str(tmp_path / "corpus.txt"),), "document": "line"}
        collect(collect_params(source), tmp_path / "raw")
        return tmp_path / "raw"

    return make


@pytest.fixture
def sentences() -> list[str]:
    """300 distinct documents of made-up words, enough for a small vocabulary."""
    random_ = random.Random(0)
    words = ["".join(random_.choices("abcdefghijklmnop", k=random_.randrange(2, 9))) for _ in range(200)]
    return [f"{i}: " + " ".join(random_.choices(words, k=30)) for i in range(300)]


@pytest.fixture
def trained() -> TokenizeParams:
    return tokenize_params(vocab_size=400)


@pytest.fixture
def fifths() -> SplitParams:
    return split_params(val_fraction=0.2, test_fraction=0.2)

"""What `gptpipe plan` says, against counts made another way."""

from pathlib import Path

import pytest
import tiny

from gptpipe.commands.plan import forecast
from gptpipe.shell.errors import IntegrityError, ResourceError
from gptpipe.train import runtime


def test_it_counts_what_a_training_would_do(toy_split: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in toy_split.rglob("*"))
    lines = forecast(tiny.params(), toy_split).lines
    assert lines["parameters"].startswith("25,152,")  # as the training of test_session counts them
    assert lines["training"].startswith("12 steps of 4 x 16 tokens: 768 tokens, ")
    assert lines["tokens per parameter"].startswith("0.0 ")
    assert "micro-batches of 4" in lines["memory"]
    assert "4 validations" in lines["time"]  # at steps 0, 4, 8 and 12
    assert sorted(path.stat().st_mtime_ns for path in toy_split.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "too few to train so large a model"),
        ({"train__max_steps": 10**6}, "a larger model would learn more"),
        ({"train__max_steps": 10**4}, "passes over the text: beyond about 4"),
        ({"model__context_length": 400, "train__batch_size": 1}, "times a document's mean length"),
        ({}, "validation has 1"),
    ],
)
def test_it_warns_of_what_is_lopsided(toy_split: Path, changes: dict[str, int], words: str) -> None:
    assert any(words in warning for warning in forecast(tiny.params(**changes), toy_split).warnings)


def test_it_is_quiet_about_what_is_in_proportion(toy_split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpipe.commands.plan._REPEATS", 1000)
    warnings = forecast(tiny.params(train__max_steps=10**4), toy_split).warnings
    assert [warning.split(" ")[0] for warning in warnings] == ["validation"]  # the toy split is what it is


def test_it_raises_what_the_training_would(toy_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IntegrityError):
        forecast(tiny.params(), tmp_path)
    monkeypatch.setattr(runtime, "free_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match="micro-batches of 1 need about"):
        forecast(tiny.params(), toy_split)

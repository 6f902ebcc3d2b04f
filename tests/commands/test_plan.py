"""`gptpipe plan`, compared with counts made in another way."""

from pathlib import Path

import pytest
import tiny

from gptpipe.commands.plan import estimate_training
from gptpipe.shell.errors import IntegrityError, ResourceError


def test_estimate_has_the_counts_of_the_training(toy_split: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in toy_split.rglob("*"))
    lines = estimate_training(tiny.params(), toy_split).lines
    assert lines["parameters"].startswith("25,152,")  # the same number as in test_session
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
        ({"train__max_steps": 10**4}, "passes over the text: after about 4"),
        ({"model__context_length": 400, "train__batch_size": 1}, "times the mean document length"),
        ({}, "validation has 1"),
    ],
)
def test_warns_of_unusual_proportions(toy_split: Path, changes: dict[str, int], words: str) -> None:
    warnings = estimate_training(tiny.params(**changes), toy_split).warnings
    assert any(words in warning for warning in warnings)


def test_does_not_warn_of_usual_proportions(toy_split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpipe.commands.plan._USEFUL_PASSES", 1000)
    warnings = estimate_training(tiny.params(train__max_steps=10**4), toy_split).warnings
    assert [warning.split(" ")[0] for warning in warnings] == ["validation"]  # the toy split is small


def test_raises_errors_of_the_training(
    toy_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IntegrityError):
        estimate_training(tiny.params(), tmp_path)
    monkeypatch.setattr("gptpipe.commands.probes.free_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match="micro-batches of 1 need about"):
        estimate_training(tiny.params(), toy_split)

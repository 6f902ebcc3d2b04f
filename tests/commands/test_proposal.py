"""`gptpipe plan --minutes` on a toy split, with two small networks."""

from pathlib import Path

import pytest
import tiny

from gptpipe.commands.choice import Shape
from gptpipe.commands.proposal import propose_training
from gptpipe.params import Params
from gptpipe.shell.errors import ConfigError, InputError


@pytest.fixture(autouse=True)
def _two_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpipe.commands.proposal.SHAPES", (Shape(1, 64), Shape(2, 64)))


def test_proposal_is_a_training_with_a_predicted_score(toy_split: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in toy_split.rglob("*"))
    proposal = propose_training(tiny.params(), toy_split, minutes=1)
    options = dict(option.split("=") for option in proposal.options.removeprefix("-S ").split(" -S "))
    assert (options["model.n_embd"], options["model.n_head"], options["model.n_inner"]) == ("64", "1", "160")
    assert options["model.dropout"] == "0.1"  # the text is small, so there are almost 16 passes over it
    lines = proposal.estimate.lines
    assert " passes, dropout 0.1: about " in lines["1 x 64"]
    assert lines["training"].startswith(
        f"{int(options['train.max_steps']):,} steps of {options['train.batch_size']} x 16"
    )
    bits, low, high = (float(word.rstrip(",")) for word in lines["bits per byte"].split() if word[0].isdigit())
    assert 0 < low < bits < high < 8
    assert sorted(path.stat().st_mtime_ns for path in toy_split.rglob("*")) == before


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_impossible_times_are_rejected(toy_split: Path, minutes: float) -> None:
    with pytest.raises(ConfigError, match=r"--minutes .*: give a number above 0"):
        propose_training(tiny.params(), toy_split, minutes)


@pytest.mark.parametrize(
    ("params", "minutes", "error", "words"),
    [
        (tiny.params(), 1e-6, ConfigError, "--minutes 1e-06: too short to make 20 steps"),
        (
            tiny.params(train__init_from="models:/gpt@champion"),
            1,
            ConfigError,
            "train.init_from already decides",
        ),
        (
            tiny.params(model__context_length=1000, train__batch_size=1),
            1,
            InputError,
            "too few for any proposal",
        ),
    ],
)
def test_what_cannot_be_proposed_is_explained(
    toy_split: Path, params: Params, minutes: float, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        propose_training(params, toy_split, minutes)

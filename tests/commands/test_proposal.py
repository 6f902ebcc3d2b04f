"""`gptpipe plan --minutes` on a toy split, with two small networks."""

import re
import shutil
from pathlib import Path

import pytest
import tiny

from gptpipe.commands.choice import Shape
from gptpipe.commands.cli import _dispatch
from gptpipe.commands.proposal import propose_training
from gptpipe.params import Params
from gptpipe.shell.errors import ConfigError, InputError


@pytest.fixture(autouse=True)
def _two_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpipe.commands.proposal.SHAPES", (Shape(1, 64), Shape(2, 64)))


def test_the_command_prints_a_training_that_dvc_can_run(
    toy_split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptpipe.commands.choice.useful_repeats", lambda *_: 2.0)  # the text is small
    shutil.copy(Path(__file__).parents[2] / "params.yaml", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/split").symlink_to(toy_split)
    monkeypatch.chdir(tmp_path)
    _dispatch(["plan", "--minutes", "1"])
    printed = capsys.readouterr()
    *lines, command = printed.out.splitlines()
    assert "passes over the text: after about" not in printed.err  # it would advise against its own proposal
    assert command.startswith("dvc exp run -S model.n_layer=")
    options = dict(option.split("=") for option in command.split(" -S ")[1:])
    assert (options["model.n_embd"], options["model.n_head"], options["model.n_inner"]) == ("64", "1", "160")
    texts = dict(re.split(": +", line, maxsplit=1) for line in lines)
    assert " passes: about " in texts["1 x 64"]
    assert texts["training"].startswith(
        f"{options['train.max_steps']} steps of {options['train.batch_size']} x 256"
    )
    bits, low, high = map(float, re.findall(r"\d+\.\d+", texts["bits per byte"]))
    assert 0 < low < bits < high < 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "params.yaml"]


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_impossible_times_are_rejected(toy_split: Path, minutes: float) -> None:
    with pytest.raises(ConfigError, match=r"--minutes .*: give a number above 0"):
        propose_training(tiny.params(), toy_split, minutes)


@pytest.mark.parametrize(
    ("params", "minutes", "error", "words"),
    [
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


def test_too_little_time_is_rejected(toy_split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpipe.commands.choice.useful_repeats", lambda *_: 5.0)
    with pytest.raises(ConfigError, match="--minutes 1e-06: too short to make 20 steps"):
        propose_training(tiny.params(), toy_split, 1e-6)

"""What people see: the text as it is, and a line now and then where no terminal is."""

import pytest

from gptpipe import console
from gptpipe.console import Progress, complain, say


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a/[b]/:warning:/" + "long " * 60 + "[/red]"
    say(text)
    complain(text)
    assert capsys.readouterr() == ("", f"{text}\n{text}\n")


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_PLAIN_EVERY", -1.0)
    with Progress("train", unit="steps", total=2000, done=1000) as progress:
        progress.advance(note="loss 2.5")
        assert list(progress.track("ab")) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 1,001 of 2,000 steps  loss 2.5"
    assert lines[-1] == "train: 1,003 of 2,000 steps  loss 2.5"


def test_progress_keeps_quiet_between_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", unit="steps") as progress:
        progress.advance(1000)
    assert capsys.readouterr().err == ""

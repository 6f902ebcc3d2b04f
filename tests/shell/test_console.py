"""Console output: unchanged text, a live view on a terminal, and a line every few seconds elsewhere."""

import os
import pty
import re
import select
import subprocess
import sys

import pytest

from gptpipe.shell import console
from gptpipe.shell.console import Progress, complain, say, sparkline
from gptpipe.shell.errors import ConfigError


def test_text_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a/[b]/:warning:/" + "long " * 60 + "[/red]"
    say(text)
    complain(text)
    assert capsys.readouterr() == ("", f"{text}\n{text}\n")


def test_text_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("\x1b]0;title\x07 \x9b2J \u202e ok\tok\nok")
    complain("caf\udce9\r")
    shown = "\\x1b]0;title\\x07 \\x9b2J \\u202e ok\tok\nok\ncaf\\xe9\\x0d\n"
    assert capsys.readouterr().err.expandtabs() == shown.expandtabs()


def test_progress_prints_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_PLAIN_EVERY", -1.0)
    with Progress("train", unit="steps", total=2000, done=1000) as progress:
        progress.advance(note="loss 2.5")
        assert list(progress.track("ab")) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 1,001 of 2,000 steps  loss 2.5"
    assert lines[-1] == "train: 1,003 of 2,000 steps  loss 2.5"


def test_a_sparkline_shows_the_last_values_from_lowest_to_highest() -> None:
    assert sparkline([99.0, 0.0, 1.0, 2.0, 7.0], width=4) == "▁▂▃█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("verbosity", "printed"),
    [
        ("quiet", ["result", "warning"]),
        ("normal", ["usual", "result", "warning"]),
        ("verbose", ["detail", "usual", "result", "warning"]),
    ],
)
def test_verbosity_selects_the_lines(
    verbosity: str, printed: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTPIPE_VERBOSITY", verbosity)
    say("detail", "verbose")
    say("usual")
    say("result", "quiet")
    complain("warning")
    assert capsys.readouterr().err.splitlines() == printed


def test_an_invalid_verbosity_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_VERBOSITY", "loud")
    with pytest.raises(ConfigError, match="GPTPIPE_VERBOSITY is 'loud'"):
        say("text")


def test_progress_prints_at_most_one_line_per_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", unit="steps") as progress:
        progress.advance(1000)
    assert capsys.readouterr().err == ""


STREAMS = ("stdin", "stdout", "stderr")


def on_a_terminal(code: str, **environment: str) -> str:
    """The output of a program on a pseudo-terminal of 80 columns."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, **dict.fromkeys(STREAMS, terminal)
    )
    os.close(terminal)
    shown = b""
    try:
        while select.select([controller], [], [], 60)[0] and (piece := os.read(controller, 4096)):
            shown += piece
    except OSError:  # Linux raises it when the program has closed the terminal
        pass
    finally:
        os.close(controller)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


def test_a_terminal_shows_the_live_view() -> None:
    code = """
import time
from gptpipe.shell.console import Progress, say
with Progress("train", unit="steps", total=9) as progress:
    progress.sample = "the cat [b]sat[/b] " + "on the mat " * 20
    time.sleep(0.15)
    progress.advance(3, note="loss 2.500  900 tokens/s", course=[3.0, 2.0, 2.5])
    time.sleep(0.3)
    say("above")
say("end", "quiet")
"""
    shown = on_a_terminal(code)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").split("\n")
    lines = [line for line in lines if line]
    assert any(line.startswith("train ") and "3/9 steps" in line and "left" in line for line in lines)
    assert "loss 2.500  900 tokens/s  █▁▅" in lines
    (sample,) = {line for line in lines if line.startswith("the cat")}
    assert sample.startswith("the cat [b]sat[/b] on the mat")
    assert (len(sample), sample[-1]) == (80, "…")
    assert lines[-1] == "end"
    assert "above" in lines
    quiet = on_a_terminal(code, GPTPIPE_VERBOSITY="quiet")
    assert quiet == "end\r\n"

"""What people meet first: `gptpipe`, the stages' help, and how errors end a program."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model

from gptpipe.commands.cli import _dispatch
from gptpipe.shell.errors import GptpipeError, IntegrityError, Interrupted, NumericError, ResourceError
from gptpipe.shell.process import run

ROOT = Path(__file__).parents[2]


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def gptpipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-c", "from gptpipe.commands.cli import main; main()", *arguments)


def test_generate_continues_the_prompt_by_its_seed(tmp_path: Path) -> None:
    model = make_model(tmp_path / "gpt")
    command = ("generate", "the cat", "--model", str(model), "--max-new-tokens", "8")
    first, again, other = gptpipe(*command), gptpipe(*command), gptpipe(*command, "--seed", "1")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("the cat")
    assert first.stdout == again.stdout != other.stdout


def test_the_help_is_a_map_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*command: str) -> str:
        with pytest.raises(SystemExit):
            _dispatch([*command, "--help"])
        return capsys.readouterr().out

    shown = help_of()
    for command in ("plan", "doctor", "compare", "generate", "restore"):
        assert re.search(rf"^(\w+)? +gptpipe {command}\b.*  \w", shown, re.MULTILINE)
        assert f"gptpipe {command} [-h]" in help_of(command)
    for command in ("dvc repro", "dvc exp run", "mlflow ui", "dvc plots show", "dvc push"):
        assert f"   {command} " in shown


def test_generate_asks_for_prompt_after_prompt(tmp_path: Path) -> None:
    """On a terminal: Ctrl-C ends a text and not the program, the arrow brings the last prompt again, Ctrl-D ends."""
    model = make_model(tmp_path / "gpt")
    controller, terminal = pty.openpty()
    command = ["-m", "gptpipe.commands.cli", "generate", "--interactive", "--model", str(model), "--temperature", "0"]
    process = subprocess.Popen([sys.executable, *command, "--max-new-tokens", "1000000"], cwd=ROOT, stdin=terminal,
                               stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    os.close(terminal)

    def read_until(pattern: str) -> str:
        shown = ""
        while not re.search(pattern, shown, re.DOTALL):
            assert len(shown) < 20_000, shown[:2000]
            assert select.select([controller], [], [], 60)[0], shown
            shown += os.read(controller, 1024).decode(errors="replace")
        return shown

    try:
        texts = []
        for typed in (b"the cat\n", b"\x1b[A\n"):
            read_until("> $")
            os.write(controller, typed)
            texts.append(read_until(r"the cat\r\nthe cat.{40}").split("the cat\r\n")[1][:40])
            process.send_signal(signal.SIGINT)
        assert texts[0] == texts[1]
        read_until("> $")
        os.write(controller, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "the", "--interactive"]])
def test_generate_wants_one_of_prompt_and_interactive(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _dispatch(arguments)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["the", "--max-new-tokens", "0"], 2), (["the", "--max-new-tokens", "-5"], 2), (["the \udcff"], 3),
     (["the", "--top-k", "-1"], 2), (["the", "--seed", str(2**70)], 2), (["the", "--temperature", "nan"], 2)],
)  # fmt: skip
def test_generate_rejects_what_it_cannot_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    model = make_model(tmp_path / "gpt")
    with pytest.raises(SystemExit) as ended:
        run(lambda: _dispatch(["generate", "--model", str(model), *arguments]))
    found = capsys.readouterr()
    assert (ended.value.code, found.out, len(found.err.splitlines())) == (code, "", 1)


def test_plan_needs_a_split_and_says_how_to_get_one(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    result = python("-c", "from gptpipe.commands.cli import main; main()", "plan", folder=tmp_path)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (4, "", 1)
    assert "dvc repro" in result.stderr


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = gptpipe("generate", "hello", "--model", str(tmp_path / "none"))
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (4, "", 1)
    assert str(tmp_path / "none") in result.stderr


@pytest.mark.parametrize("stage", ["collect", "tokenize", "split", "train", "evaluate"])
def test_a_stage_says_what_it_does(stage: str) -> None:
    result = python("-m", f"stages.{stage}", "--help")
    assert result.returncode == 0
    assert f"{stage}: " in result.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [(IntegrityError("m"), 4), (ResourceError("m"), 5), (NumericError("m"), 6), (Interrupted(15, "m"), 143)],
)
def test_an_error_becomes_a_line_and_its_exit_code(
    error: GptpipeError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"

"""The command `gptpipe`, the help of the stages, and how errors end a program."""

import io
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
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.shell.errors import GptpipeError, IntegrityError, Interrupted, NumericError, ResourceError
from gptpipe.shell.process import run

ROOT = Path(__file__).parents[2]
CLI = ("-m", "gptpipe.commands.cli")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # this checkout, also where another is installed
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tiny model folder."""
    return str(make_model(tmp_path_factory.mktemp("model") / "gpt"))


def test_help_lists_every_command_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    def help_of(*command: str) -> str:
        with pytest.raises(SystemExit):
            _dispatch([*command, "--help"])
        return capsys.readouterr().out

    text = help_of()
    commands = ("plan", "data", "doctor", "compare", "generate", "score", "serve", "export", "restore")
    for command in commands:
        assert re.search(rf"^ +{command}  +[A-Z].*\.$", text, re.MULTILINE)
        help_of_command = help_of(command)
        assert f"gptpipe {command} [-h]" in help_of_command
        assert "default: None" not in help_of_command
        assert "default: False" not in help_of_command
    for command in ("dvc repro", "dvc exp run", "dvc plots show", "dvc push", "mlflow ui"):
        assert f"  {command} " in text
    assert max(map(len, text.splitlines())) <= 80


def test_generate_continues_the_prompt(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes print the same with the same seed: a new one and this one."""
    command = ("generate", "the cat", "--model", model, "--max-new-tokens", "8")
    first = python(*CLI, *command)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("the cat")
    _dispatch(command)
    assert capsys.readouterr().out.replace("\r", "\n") == first.stdout  # as a pipe of text gives it
    _dispatch([*command, "--seed", "1"])
    assert capsys.readouterr().out != first.stdout


def test_generate_ends_before_a_stop_string(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def generate(*options: str) -> str:
        _dispatch(["generate", "the", "--model", model, "--max-new-tokens", "40", *options])
        return capsys.readouterr().out.removesuffix("\n")

    whole = generate()
    stop = whole[20:22]
    assert generate("--stop", "never seen", "--stop", stop) == "the" + whole[3:].partition(stop)[0]
    assert generate("--repetition-penalty", "2", "--min-p", "0.5") != whole


@pytest.mark.slow
def test_generate_answers_prompts_on_a_terminal(model: str) -> None:
    """Ctrl-C ends a continuation, the up arrow brings back the last prompt, Ctrl-D ends the program."""
    controller, terminal = pty.openpty()
    command = [*CLI, "generate", "--interactive", "--model", model, "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, *command, "--max-new-tokens", "1000000"],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(terminal)

    def read_until(pattern: str) -> str:
        text = ""
        while not re.search(pattern, text, re.DOTALL):
            assert len(text) < 20_000, text[:2000]
            assert select.select([controller], [], [], 60)[0], text
            text += os.read(controller, 1024).decode(errors="replace")
        return text

    try:
        continuations = []
        up_arrow = b"\x1b[A"
        for typed in (b"the cat\n", up_arrow + b"\n"):
            read_until("> $")
            os.write(controller, typed)
            answer = read_until(r"the cat\r\nthe cat.{40}")
            continuations.append(answer.split("the cat\r\n")[1][:40])
            process.send_signal(signal.SIGINT)
        assert continuations[0] == continuations[1]
        read_until("> $")
        end_of_input = b"\x04"
        os.write(controller, end_of_input)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "the", "--interactive"]])
def test_generate_needs_either_prompt_or_interactive(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _dispatch(arguments)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["the", "--max-new-tokens", "0"], 2),
        (["the", "--max-new-tokens", "-5"], 2),
        (["the", "--max-new-tokens", "-1"], 2),
        (["the", "--max-new-tokens", "-20"], 2),
        (["the", "--top-k", "-1"], 2),
        (["the", "--top-p", "0"], 2),
        (["the", "--top-p", "1.5"], 2),
        (["the", "--top-p", "nan"], 2),
        (["the", "--seed", "-1"], 2),
        (["the", "--seed", str(2**70)], 2),
        (["the", "--temperature", "nan"], 2),
        (["the", "--temperature", "-0.1"], 2),
        (["the", "--temperature", "inf"], 2),
        (["--interactive", "--max-new-tokens", "-1"], 2),
        (["the", "--min-p", "1.5"], 2),
        (["the", "--repetition-penalty", "0"], 2),
        (["the", "--stop", ""], 2),
        (["the \udcff"], 3),  # a byte that is not UTF-8
    ],
)
def test_generate_rejects_invalid_options(
    model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    assert fails_with_one_line(capsys, "generate", "--model", model, *arguments)[0] == code


def test_generate_says_if_it_cuts_the_prompt(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "the cat sat on the mat, " * 9
    n_tokens = len(Tokenizer.load(Path(model)).encode(prompt))
    assert n_tokens > 16
    for text in (prompt, "the cat"):
        _dispatch(["generate", text, "--model", model, "--max-new-tokens", "2"])
    output = capsys.readouterr()
    assert output.out.startswith(prompt)
    assert output.err == (
        f"warning: the prompt has {n_tokens} tokens, the context of the model has 16; "
        "only the last 16 are used\n"
    )


def test_generate_prints_text_that_the_terminal_cannot_encode(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run(lambda: _dispatch(["generate", "café 猫", "--model", model, "--max-new-tokens", "1"]))
    assert written.getvalue().startswith(rb"caf\xe9 \u732b")


def fails_with_one_line(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    """The exit code of a command that fails, and its only line of output."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: _dispatch(command))
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == ""
    return int(ended.value.code or 0), line


def test_generate_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none")
    code, line = fails_with_one_line(capsys, "generate", "hello", "--model", missing)
    assert code == 4
    assert missing in line


def test_plan_without_a_split_is_one_line_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, line = fails_with_one_line(capsys, "plan")
    assert code == 4
    assert "dvc repro" in line


def test_a_plan_for_no_time_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, line = fails_with_one_line(capsys, "plan", "--minutes", "0")
    assert (code, "--minutes 0: give a number above 0" in line) == (2, True)


def test_commands_work_in_a_subfolder_with_paths_relative_to_it(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subfolder = tmp_path / "data/sources"
    (tmp_path / ".dvc").mkdir()
    subfolder.mkdir(parents=True)
    shutil.copytree(model, tmp_path / "models/gpt")
    shutil.copytree(model, subfolder / "mine")
    for options in ([], ["--model", "mine"]):
        monkeypatch.chdir(subfolder)
        _dispatch(["generate", "the", "--max-new-tokens", "2", *options])
        assert capsys.readouterr().out.startswith("the")
    shutil.rmtree(subfolder / "mine")
    monkeypatch.chdir(subfolder)
    code, line = fails_with_one_line(capsys, "generate", "the", "--model", "mine")
    assert (code, str(subfolder / "mine") in line) == (4, True)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(subfolder)
    code, line = fails_with_one_line(capsys, "plan")
    assert (code, "data/split" in line) == (4, True)


@pytest.mark.parametrize("command", ["plan", "data", "doctor", "compare", "generate", "restore"])
def test_a_folder_outside_any_project_is_reported_and_stays_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = fails_with_one_line(capsys, command, *(["x"] if command in ("generate", "restore") else []))
    assert (code, line) == (
        2,
        f"error: {tmp_path}: neither this folder nor one above is a gptpipe project; change to one with `cd`",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["collect", "tokenize", "split", "train", "evaluate"])
def test_help_of_a_stage_says_what_it_does(stage: str) -> None:
    result = python("-m", f"stages.{stage}", "--help")
    assert result.returncode == 0
    assert f"{stage}: " in result.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [(IntegrityError("m"), 4), (ResourceError("m"), 5), (NumericError("m"), 6), (Interrupted(15, "m"), 143)],
)
def test_error_becomes_one_line_and_its_exit_code(
    error: GptpipeError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"

"""Exit codes, which scripts rely on, and messages that cannot control a terminal."""

import pickle
import signal

import pytest

from gptpipe.shell import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [("ConfigError", 2), ("InputError", 3), ("IntegrityError", 4), ("ResourceError", 5), ("NumericError", 6)],
)
def test_each_kind_of_error_has_its_exit_code(kind: str, code: int) -> None:
    error = getattr(errors, kind)
    assert error.exit_code == code
    assert issubclass(error, errors.GptpipeError)


def test_the_exit_code_of_a_signal_is_128_plus_its_number() -> None:
    assert errors.Interrupted(signal.SIGTERM, "saved").exit_code == 143
    assert str(errors.Interrupted(signal.SIGINT, "saved")) == "SIGINT: saved"
    assert errors.Interrupted(signal.SIGINT, "saved").exit_code == 130


def test_first_line_shortens_a_message() -> None:
    assert errors.first_line(ValueError("one\ntwo")) == "one"
    assert errors.first_line(ValueError()) == "ValueError"
    assert len(errors.first_line(ValueError("long " * 1000))) == 300


SHOWN_AS_ESCAPES = [
    ("\x00", "\\x00"),
    ("\x07", "\\x07"),
    ("\x1b[31m", "\\x1b[31m"),
    ("\r", "\\x0d"),
    ("\x7f", "\\x7f"),
    ("\x85", "\\x85"),
    ("\x9b31m", "\\x9b31m"),
    ("\u2028", "\\u2028"),
    ("\u202e", "\\u202e"),
    ("\u2066", "\\u2066"),
    ("\udce9", "\\xe9"),
    ("\ud800", "\\ud800"),
]
ORDINARY = "a\tb\nc é 漢 🙂 👩\u200d👧 \u06cc\u200c\u062e \u200f \xa0 \ufeff \\x1b"


@pytest.mark.parametrize(("text", "shown"), SHOWN_AS_ESCAPES)
def test_a_message_cannot_control_the_terminal(text: str, shown: str) -> None:
    assert errors.printable(f"a{text}b") == f"a{shown}b"
    assert str(errors.InputError(f"a{text}b: damaged")) == f"a{shown}b: damaged"


def test_ordinary_text_is_printed_unchanged() -> None:
    assert errors.printable(ORDINARY) == ORDINARY


def test_a_message_has_one_line_per_argument() -> None:
    """A newline in a file name once split the message in two lines. Pickle sends errors to another process."""
    error = errors.ConfigError("a\nb\tc: unknown key", "d: missing")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert str(copy) == "a\\nb\\tc: unknown key\nd: missing"

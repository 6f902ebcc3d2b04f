"""Exit codes, which scripts rely on."""

import signal

import pytest

from gptpipe import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [("ConfigError", 2), ("InputError", 3), ("IntegrityError", 4), ("ResourceError", 5), ("NumericError", 6)],
)
def test_exit_codes(kind: str, code: int) -> None:
    error = getattr(errors, kind)
    assert error.exit_code == code
    assert issubclass(error, errors.GptpipeError)


def test_signals_end_as_a_shell_expects() -> None:
    assert errors.Interrupted(signal.SIGTERM, "saved").exit_code == 143
    assert str(errors.Interrupted(signal.SIGINT, "saved")) == "SIGINT: saved"
    assert errors.Interrupted(signal.SIGINT, "saved").exit_code == 130


def test_first_line() -> None:
    assert errors.first_line(ValueError("one\ntwo")) == "one"
    assert errors.first_line(ValueError()) == "ValueError"

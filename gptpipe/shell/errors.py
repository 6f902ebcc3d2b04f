"""Errors that a user can fix, and the exit code of each kind.

A message is one line: what is wrong, where, and how to fix it.
"""

import re
import signal

# C0 and C1 controls except tab and newline, line and paragraph separators, bidirectional overrides, lone
# surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_REASON = 300  # characters of a library's message


class GptpipeError(Exception):
    """Base of the errors that a user can fix. Raise a subclass. Each argument is one line of the message."""

    exit_code = 1

    def __str__(self) -> str:
        return "\n".join(one_line(str(line)) for line in self.args)


class ConfigError(GptpipeError):
    """params.yaml, or a combination of its values, cannot be used."""

    exit_code = 2


class InputError(GptpipeError):
    """The user's data cannot be read, or there is too little of it."""

    exit_code = 3


class IntegrityError(GptpipeError):
    """An artefact differs from its manifest."""

    exit_code = 4


class ResourceError(GptpipeError):
    """Disk, memory, a lock or another external resource is unavailable."""

    exit_code = 5


class NumericError(GptpipeError):
    """A loss or a gradient is not finite."""

    exit_code = 6
    red_flag = "not_finite"  # name of the red flag in the record


class SpikeError(NumericError):
    """A loss or a gradient is far above the values of the last steps."""

    red_flag = "spike"


class Interrupted(GptpipeError):
    """A signal stopped the run, after it saved its state."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {message}")
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """The first line of a library's message, shortened; the name of the error's class if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:_LONGEST_REASON]


def printable(text: str) -> str:
    """`text` with control characters, bidirectional overrides and lone surrogates as escapes like `\\x1b`.

    Otherwise, text from documents, models, files and servers could control the terminal. Tabs and newlines
    stay.
    """
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """As `printable`, and newlines and tabs are shown as escapes too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    if 0xDC80 <= number <= 0xDCFF:  # how Python represents a byte of a file name that is not UTF-8
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"

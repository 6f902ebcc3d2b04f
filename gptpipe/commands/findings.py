"""What a check of `gptpipe doctor` returns: its status, one line of text, and how to fix what is wrong."""

from dataclasses import dataclass
from typing import Literal

from gptpipe.shell.errors import GptpipeError


@dataclass(frozen=True)
class Finding:
    """The result of one check. A warning means that nothing is broken, but that someone should look."""

    status: Literal["ok", "warning", "error"]
    text: str  # one line: what was found, and where
    fix: str = ""  # what the user can do
    exit_code: int = 0  # of the doctor, if the status is `error`

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}" if self.fix else self.text


def ok(text: str) -> Finding:
    return Finding("ok", text)


def warning(text: str, fix: str = "") -> Finding:
    return Finding("warning", text, fix)


def problem(kind: type[GptpipeError], text: str, fix: str = "") -> Finding:
    """An error; the doctor ends with the exit code of `kind`."""
    return Finding("error", text, fix, kind.exit_code)


NOT_MADE = ok("nothing made yet; `dvc repro` makes it, `dvc pull` fetches what was pushed")

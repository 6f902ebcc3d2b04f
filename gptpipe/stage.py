"""How a process of this project starts and ends: signals, errors, exit codes."""

import argparse
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptpipe.console import complain
from gptpipe.environment import verbosity
from gptpipe.errors import GptpipeError

_PR_SET_PDEATHSIG = 1


def run(main: Callable[[], None]) -> None:
    """Run a program; an error that the user can mend becomes one line and its exit code."""
    try:
        verbosity()  # a wrong one is told before the work
        main()
    except GptpipeError as error:
        complain(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        complain("error: SIGINT: stopped; rerun to start this stage anew")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone, `| head` for one
        sys.stderr.close()
        sys.exit(141)


def run_stage(main: Callable[[], None], description: str | None) -> None:
    """Run a pipeline stage, which takes no options: its values are in params.yaml."""
    argparse.ArgumentParser(description=description, epilog="Values: params.yaml. Run by `dvc repro`.").parse_args()
    _end_with_parent()
    signal.signal(signal.SIGTERM, _terminate)
    run(main)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once, like SIGKILL: for a library that would keep them waiting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _terminate(signum: int, _: object) -> None:
    """Leave through the `finally` blocks, so that no partial file stays."""
    complain("error: SIGTERM: stopped; rerun to start this stage anew")
    sys.exit(128 + signum)


def _end_with_parent() -> None:
    """On Linux, ask for SIGTERM when the parent dies: `dvc` killed alone must not leave a trainer behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

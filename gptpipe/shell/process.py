"""Start and end of a process: signals, the death of its parent, the lock of a stage, errors and exit codes.

The top of this module imports only the standard library. Other imports take seconds, and a stage must arrange
first that it ends with its parent.
"""

import argparse
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 1.0  # between two checks that `dvc` is running


class Stopped(KeyboardInterrupt):
    """Raised by a signal, so that `finally` blocks remove partial files before the process ends."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def run(main: Callable[[], None], advice: str = "") -> None:
    """Run a program. Print one line for a signal or an error that the user can fix, and exit with its code."""
    _escape_unencodable()
    try:
        _run(main)
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        sys.stderr.write(f"error: {signal.Signals(signum).name}: stopped{advice}\n")
        sys.exit(128 + signum)
    except BrokenPipeError:  # the reader of the output has ended, for example `| head`
        sys.stderr.close()
        sys.exit(141)


def _escape_unencodable() -> None:
    """Print characters that the terminal's encoding lacks as escapes like `\\xe9`; they would be errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(main: Callable[[], None]) -> None:
    from gptpipe.shell.console import complain
    from gptpipe.shell.environment import limit_busy_waiting, verbosity
    from gptpipe.shell.errors import GptpipeError

    try:
        verbosity()  # fail early on an invalid value
        limit_busy_waiting()
        main()
    except GptpipeError as error:
        complain(f"error: {error}")
        sys.exit(error.exit_code)
    except MemoryError:
        complain("error: out of memory; free memory, or lower GPTPIPE_WORKERS, then rerun")
        sys.exit(5)


def run_stage(name: str, main: Callable[[], None], description: str | None) -> None:
    """Run a stage of the pipeline. It has no options: its values are in params.yaml.

    Only one process at a time can run a stage in a workspace; a second one ends with exit code 5.
    """
    _end_with_parent()
    try:
        run(lambda: _run_alone(name, main, description), advice="; `dvc repro` continues")
    except Stopped:
        pass  # the signal came after `run`: the work is complete
    except SystemExit as end:
        if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)  # running threads of libraries make an ordinary exit slow and noisy
        raise
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)  # from here on, nothing catches what `_stop` raises


def _run_alone(name: str, main: Callable[[], None], description: str | None) -> None:
    stop_at_signals()  # not earlier: `run` catches what they raise
    parser = argparse.ArgumentParser(description=description, epilog="Values: params.yaml. Run by `dvc repro`.")
    parser.parse_args()
    from gptpipe.shell.environment import rank_info
    from gptpipe.shell.locks import one_writer

    if rank_info().rank > 0:  # rank 0 holds the lock, because it alone writes
        main()
        return
    with one_writer(Path(name)):
        main()


def stop_at_signals() -> None:
    """From now on, SIGINT and SIGTERM raise Stopped, which `run` catches."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process immediately. Use it around a library call that delays signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stop(signum: int, _: object) -> None:
    """Signal handler: raise Stopped. A second signal ends the process immediately."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise Stopped(signum)


def _end_with_parent() -> None:
    """On Linux, get SIGTERM when the parent ends, and exit now if `dvc` has already ended.

    If only `dvc` is killed, its stage must end too. Otherwise the next `dvc repro` would write the same files.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if "DVC_STAGE" not in os.environ:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()  # torchrun, which does not end with `dvc`
        threading.Thread(target=_end_after_dvc, args=[launcher], daemon=True).start()
    elif _is_orphan(os.getpid()):
        sys.exit(128 + signal.SIGTERM)


def end_worker_with_parent() -> None:
    """In a worker process of `multiprocessing`: leave Ctrl-C to the parent, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _is_orphan(pid: int) -> bool:
    """Whether `dvc`, which started the process `pid`, has ended.

    `dvc` and its stages are in one process group. The parent of an orphan is init or another process outside of
    it.
    """
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return os.getpgid(parent) != os.getpgid(pid)
    except (FileNotFoundError, ProcessLookupError):  # one of the processes has just ended
        return True


def _end_after_dvc(launcher: int) -> None:
    """Send this process SIGTERM once `launcher` is an orphan."""
    while not _is_orphan(launcher):
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)

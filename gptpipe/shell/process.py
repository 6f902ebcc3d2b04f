"""How a process of this project starts and ends: parent, signals, lock, errors, exit codes.

This module imports only the standard library at its top, so that a stage asks to end with its parent first of all:
the other imports take seconds.
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
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0  # between looks whether `dvc` is still there


class Stopped(KeyboardInterrupt):
    """A signal stops the process; its `finally` blocks run first, so that no partial file stays."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def run(main: Callable[[], None], advice: str = "") -> None:
    """Run a program; an error that the user can fix, or a signal, becomes one line and its exit code."""
    try:
        _run(main)
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        sys.stderr.write(f"error: {signal.Signals(signum).name}: stopped{advice}\n")
        sys.exit(128 + signum)
    except BrokenPipeError:  # the reader of our output has ended, for example `| head`
        sys.stderr.close()
        sys.exit(141)


def _run(main: Callable[[], None]) -> None:
    from gptpipe.shell.console import complain
    from gptpipe.shell.environment import verbosity
    from gptpipe.shell.errors import GptpipeError

    try:
        verbosity()  # fail early on an invalid value
        main()
    except GptpipeError as error:
        complain(f"error: {error}")
        sys.exit(error.exit_code)
    except MemoryError:
        complain("error: out of memory; free memory, or lower GPTPIPE_WORKERS, then rerun")
        sys.exit(5)


def run_stage(name: str, main: Callable[[], None], description: str | None) -> None:
    """Run a pipeline stage, which takes no options: its values are in params.yaml.

    Only one process at a time runs a stage in a workspace; a second one ends with exit code 5.
    """
    _end_with_parent()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    argparse.ArgumentParser(description=description, epilog="Values: params.yaml. Run by `dvc repro`.").parse_args()
    try:
        run(lambda: _run_alone(name, main), advice="; `dvc repro` continues")
    except Stopped:
        pass  # a signal after the end of `run`: the work is done
    except SystemExit as end:
        if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)  # at once: libraries whose threads are at work make an ordinary exit slow and noisy
        raise
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)  # nobody would catch what `_stop` raises


def _run_alone(name: str, main: Callable[[], None]) -> None:
    from gptpipe.shell.environment import rank_info
    from gptpipe.shell.locks import one_writer

    if rank_info().rank > 0:  # rank 0 writes, and holds the lock
        main()
        return
    with one_writer(Path(name)):
        main()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once, like SIGKILL: for a library that would delay them."""
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
    """Stop the process; a second signal ends it at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise Stopped(signum)


def _end_with_parent() -> None:
    """On Linux, ask for SIGTERM when the parent ends, and end now if `dvc` has ended already.

    `dvc` killed alone must not leave a stage behind, whose files the next `dvc repro` would write too.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if "DVC_STAGE" not in os.environ:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()  # torchrun, which does not notice that `dvc` has ended
        threading.Thread(target=_end_with_dvc, args=[launcher], daemon=True).start()
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
    """Whether `dvc`, which started this process, has ended.

    `dvc` runs its stages in its own process group. An orphan's parent is init or another process outside the group.
    """
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return os.getpgid(parent) != os.getpgid(pid)
    except (FileNotFoundError, ProcessLookupError):  # one of them ended just now
        return True


def _end_with_dvc(launcher: int) -> None:
    while not _is_orphan(launcher):
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)

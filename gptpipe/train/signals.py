"""Ctrl-C and SIGTERM during training: the step in progress is finished and saved first."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gptpipe.shell.errors import Interrupted
from gptpipe.train.distributed import all_reduce


@contextmanager
def deferred_signals() -> Iterator[Callable[[], None]]:
    """Yield a check that raises Interrupted once SIGINT or SIGTERM has reached this rank or another one.

    A second signal ends the process at once.
    """
    received: list[int] = []

    def handle(signum: int, _: object) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)

    def check_stop() -> None:
        of_any_rank = all_reduce(torch.tensor(max(received, default=0)), torch.distributed.ReduceOp.MAX)
        if signum := int(of_any_rank):
            raise Interrupted(signum, "train: stopped after saving; rerun to continue from there")

    is_main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if is_main_thread else ()
    previous = {signum: signal.signal(signum, handle) for signum in signals}
    try:
        yield check_stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

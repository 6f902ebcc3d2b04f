"""The ordered map: same results whatever the number of processes, and no process outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from gptpipe.errors import IntegrityError, ResourceError
from gptpipe.files import verify
from gptpipe.parallel import map_in_order

# Workers import what they run by name, so tests give them functions of installed modules.


@pytest.mark.parametrize("workers", ["1", "3"])
def test_results_come_in_the_order_of_the_items(monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", workers)
    items = [f"{i:x}" for i in range(20)]
    assert list(map_in_order(partial(int, base=16), items)) == list(range(20))
    assert list(map_in_order(partial(int, base=16), [])) == []


def test_work_is_done_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    parents = set(map_in_order(eval, ["__import__('os').getppid()"] * 2))
    assert parents == {os.getpid()}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_error_of_a_worker_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", workers)
    with pytest.raises(IntegrityError, match=r"manifest\.json: No such file"):
        list(map_in_order(verify, [tmp_path, tmp_path]))


def test_a_killed_worker_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    with pytest.raises(ResourceError, match="a worker process was killed"):
        list(map_in_order(os._exit, [9, 9]))


PROGRAM = """
import time
from gptpipe.parallel import map_in_order
if __name__ == "__main__":
    list(map_in_order(time.sleep, [0, 0, 60, 60]))
"""


def children_of(pid: int) -> list[int]:
    found = [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the parent alone once left its workers waiting for ever."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"])
    workers: list[int] = []
    until = time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        workers = children_of(parent.pid)
    time.sleep(2)  # for the workers to have started their watch
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(workers) == 2
    assert not any(map(is_running, workers))

"""Generators in a child process: the same items, errors that name the file, and no process that outlives its parent."""

import os
import subprocess
import sys

import pytest
from processes import all_end, is_running

from gptpipe.base import isolated as module
from gptpipe.base.isolated import isolated
from gptpipe.shell.errors import InputError, IntegrityError, ResourceError

# The child imports its function by name, so the tests use `eval` and write the generator as text.
COUNT = "range(100_000)"
VERIFY = "__import__('gptpipe.base.manifest').base.manifest.verify"
KILL_ME = "__import__('os').kill(__import__('os').getpid()"


def test_an_isolated_generator_yields_the_same_items_from_another_process() -> None:
    assert list(isolated("a", eval, COUNT)) == list(range(100_000))
    assert list(isolated("a", eval, "(__import__('os').getppid() for _ in 'a')")) != [os.getpid()]


def test_the_child_ends_when_the_generator_is_closed() -> None:
    endless = isolated("a", eval, "__import__('itertools').repeat(__import__('os').getpid())")
    child = next(endless)
    assert is_running(child)
    endless.close()
    assert not is_running(child)


@pytest.mark.parametrize(
    ("work", "error", "words"),
    [
        (f"iter({KILL_ME}, 6))", InputError, r"its reader crashed \(SIGABRT\)"),
        (f"iter({KILL_ME}, 11))", InputError, r"its reader crashed \(SIGSEGV\)"),
        (f"iter({KILL_ME}, 9))", ResourceError, "its reader was killed; if memory"),
        ("iter(__import__('os')._exit(7))", InputError, r"its reader crashed \(exit code 7\)"),
        ("iter(bytes(200 << 20))", InputError, "needs more than 100 MiB of memory to read"),
        (f"{VERIFY}(__import__('pathlib').Path('/a'))", IntegrityError, "manifest"),
        ("iter(1 / 0)", RuntimeError, "ZeroDivisionError"),
        ("iter(__import__('time').sleep(60))", InputError, "no data from its reader in 1 s"),
    ],
)
def test_errors_and_crashes_of_the_child_are_reported(
    monkeypatch: pytest.MonkeyPatch, work: str, error: type[Exception], words: str
) -> None:
    """A native crash once ended the whole stage. Now the error names the file."""
    if "sleep" in work:
        monkeypatch.setattr(module, "_TIMEOUT", 1.0)
    with pytest.raises(error, match=words):
        list(isolated("a.parquet", eval, work, memory=100 << 20))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_no_process_outlives_a_killed_parent() -> None:
    """The generator's process ends, and so does the server that it was forked from."""
    program = """
from gptpipe.base.isolated import isolated
for child in isolated("a", eval, "iter(lambda: __import__('time').sleep(0.1) or __import__('os').getpid(), 0)"):
    print(child, __import__("multiprocessing.forkserver").forkserver._forkserver._forkserver_pid, flush=True)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert all(map(is_running, pids))
    parent.kill()
    parent.communicate()
    assert all_end(pids)

"""One writer at a time."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import new_folder
from gptpipe.shell.errors import ResourceError

HOLDER = """
import sys, time
from pathlib import Path
from gptpipe.shell.locks import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def build(target: Path, text: bytes) -> None:
    with new_folder(target, {}) as folder:
        write_bytes(folder.path / "one.txt", text)


@contextmanager
def held(target: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """Start another process that holds the lock of `target` for some seconds."""
    command = [sys.executable, "-c", HOLDER, target, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder
        holder.kill()


def test_a_second_writer_stops_within_seconds_and_names_the_first(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"old")
    with held(target, 60) as holder:
        started = time.monotonic()
        with pytest.raises(
            ResourceError, match=rf"raw: process {holder.pid} on .* is writing it; wait until it ends"
        ):
            build(target, b"new")
        assert time.monotonic() - started < 5
    assert (target / "one.txt").read_bytes() == b"old"
    build(target, b"new")  # the lock of a killed process is free
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_second_writer_waits_for_one_that_ends_soon(tmp_path: Path) -> None:
    with held(tmp_path / "raw", 0.5):
        build(tmp_path / "raw", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_writers_never_overlap(tmp_path: Path) -> None:
    """Each release removes the lock file. This must not let two writers in at the same time."""
    program = """
import sys, time
from pathlib import Path
from gptpipe.shell.locks import one_writer
counter = Path(sys.argv[1])
for _ in range(40):
    with one_writer(counter):
        n = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(n + 1))
"""
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", program, counter]
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert counter.read_text() == "120"

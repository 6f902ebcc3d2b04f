"""A stage ends by a signal, or when its parent ends, and leaves no partial files."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptpipe.shell.errors import InputError
from gptpipe.shell.process import run

ROOT = Path(__file__).parents[2]
STAGE = """
import time
from pathlib import Path
from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import new_folder
from gptpipe.shell.process import run_stage

def main():
    with new_folder(Path("data/raw"), {}) as folder:
        write_bytes(folder.path / "a", b"half of it")
        print("at work", flush=True)
        time.sleep(120)

run_stage("toy", main, "a stage")
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]])"


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    (tmp_path / "stage.py").write_text(STAGE)
    return tmp_path / "stage.py"


def start(*command: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=Path(str(command[-1])).parent,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore SIGINT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_characters_that_a_terminal_cannot_encode_are_printed_as_escapes(
    monkeypatch: pytest.MonkeyPatch, name: str, encoding: str
) -> None:
    """Whatever a program prints: text, or an error that names a file."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding=encoding, errors="strict"))

    def fail() -> None:
        print("猫", file=getattr(sys, name), flush=True)
        raise InputError("猫.txt: not there; give another")

    with pytest.raises(SystemExit, match="3"):
        run(fail)
    expected = [rb"\u732b", rb"error: \u732b.txt: not there; give another"]
    assert written.getvalue().splitlines() == (expected if name == "stderr" else expected[:1])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_stage_with_one_line_and_no_partial_files(
    stage: Path, signum: signal.Signals, code: int
) -> None:
    process = start(stage)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr == f"error: {signum.name}: stopped; `dvc repro` continues\n"
    assert list((stage.parent / "data").iterdir()) == []


STOPPED_EARLY = """
import argparse, os, signal
from gptpipe.shell.process import run_stage

argparse.ArgumentParser.parse_args = lambda self: os.kill(os.getpid(), signal.SIGINT)
run_stage("toy", lambda: print("at work"), "a stage")
"""


def test_a_signal_before_the_work_begins_is_one_line_too(tmp_path: Path) -> None:
    """It was a traceback of the parser of arguments."""
    ended = subprocess.run([sys.executable, "-c", STOPPED_EARLY], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "error: SIGINT: stopped; `dvc repro` continues\n"


@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl")
def test_a_stage_ends_when_its_parent_is_killed(stage: Path) -> None:
    """Its partial files are removed too."""
    parent = start("-c", PARENT, stage)
    parent.kill()
    _, stderr = parent.communicate(timeout=60)  # the child keeps stderr open until it ends
    assert stderr == "error: SIGTERM: stopped; `dvc repro` continues\n"
    deadline = time.monotonic() + 60
    while list((stage.parent / "data").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


BUSY = """
import hashlib
from pathlib import Path
from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import new_folder
from gptpipe.shell.process import ended_by_signals, run_stage

def main():
    with new_folder(Path("data/raw"), {}, "key") as folder:
        with ended_by_signals():
            write_bytes(folder.path / "a", b"half of it")
            print("at work", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # about 15 minutes

run_stage("toy", main, "a stage")
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_library_call_that_does_not_return_to_python(
    stage: Path, signum: signal.Signals
) -> None:
    """Training a vocabulary on 40 MB once delayed SIGTERM by 39 seconds."""
    stage.write_text(BUSY)
    process = start(stage)
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == -signum
    assert sorted(path.name for path in (stage.parent / "data").iterdir()) == [".raw.key.partial", ".raw.lock"]


def test_a_second_process_of_a_stage_is_refused_and_names_the_first(stage: Path) -> None:
    first = start(stage)
    second = subprocess.run(
        [sys.executable, stage],
        cwd=stage.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    first.kill()
    first.communicate()
    assert second.returncode == 5
    assert second.stderr.startswith(f"error: toy: process {first.pid} on ")
    assert second.stderr.endswith("(stage) is writing it; wait until it ends, or stop it, then rerun\n")
    assert second.stderr.count("\n") == 1


ORPHAN = """
import os, subprocess, sys, time
if len(sys.argv) == 2:  # the parent, like `dvc` in one process group with its child
    child = subprocess.Popen([sys.executable, sys.argv[0], sys.argv[1], str(os.getpid())])
    time.sleep(1 if os.environ["PARENT"] == "ends" else 60)
else:
    while os.environ["PARENT"] == "ends" and os.getppid() == int(sys.argv[2]):
        time.sleep(0.01)
    sys.argv = sys.argv[1:2]
    exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl")
@pytest.mark.parametrize("parent", ["ends", "lives"])
def test_a_stage_exits_if_its_parent_ended_before_it_started(stage: Path, parent: str) -> None:
    """`dvc` is killed while Python starts."""
    (stage.parent / "orphan.py").write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "toy", "PARENT": parent}
    process = subprocess.Popen(
        [sys.executable, "orphan.py", stage],
        cwd=stage.parent,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    expected = "at work\n" if parent == "lives" else ""  # empty once all processes that held stdout have ended
    assert process.stdout.readline() == expected
    assert (stage.parent / "data").exists() == (parent == "lives")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl")
def test_a_rank_ends_when_dvc_ends_and_torchrun_does_not(stage: Path) -> None:
    dvc = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    torchrun = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]], start_new_session=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", dvc, torchrun, stage],
        cwd=stage.parent,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DVC_STAGE": "toy",
            "TORCHELASTIC_RUN_ID": "toy",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    time.sleep(1.5)  # the rank has checked at least once, and is still running
    assert list((stage.parent / "data").iterdir())
    process.kill()
    _, stderr = process.communicate(timeout=60)
    assert stderr == "error: SIGTERM: stopped; `dvc repro` continues\n"
    assert not list((stage.parent / "data").iterdir())


@pytest.mark.parametrize("name", ["collect", "tokenize", "split", "train", "evaluate"])
def test_a_stage_makes_no_slow_import_before_it_arranges_to_end_with_its_parent(name: str) -> None:
    code = (
        f"import sys; before = set(sys.modules); import stages.{name}; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {module for module in done.stdout.split() if module.startswith(("gptpipe", "stages"))}
    assert ours == {"gptpipe", "gptpipe.shell", "gptpipe.shell.process", "stages", f"stages.{name}"}
    assert not {"rich", "pydantic", "numpy", "torch"} & set(done.stdout.split())

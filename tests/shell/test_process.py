"""How a stage's process ends: by a signal, and with the parent that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
        [sys.executable, *map(str, command)], cwd=Path(str(command[-1])).parent, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs ignore
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_one_line_and_nothing_half_made(stage: Path, signum: signal.Signals, code: int) -> None:
    process = start(stage)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == f"error: {signum.name}: stopped; `dvc repro` continues\n"
    assert list((stage.parent / "data").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to be told")
def test_it_ends_with_a_killed_parent_and_leaves_nothing_half_made(stage: Path) -> None:
    """`dvc` killed alone must not leave a stage behind."""
    parent = start("-c", PARENT, stage)
    parent.kill()
    _, said = parent.communicate(timeout=60)  # which the child holds open as long as it lives
    assert said == "error: SIGTERM: stopped; `dvc repro` continues\n"
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
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # a quarter of an hour

run_stage("toy", main, "a stage")
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_library_that_never_comes_back_to_python(stage: Path, signum: signal.Signals) -> None:
    """Training a vocabulary on 40 MB kept SIGTERM waiting for 39 seconds, and a second one too."""
    stage.write_text(BUSY)
    process = start(stage)
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == -signum
    assert sorted(path.name for path in (stage.parent / "data").iterdir()) == [".raw.key.partial", ".raw.lock"]


def test_a_second_process_of_a_stage_is_refused_and_names_the_first(stage: Path) -> None:
    first = start(stage)
    second = subprocess.run(
        [sys.executable, stage], cwd=stage.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    first.kill()
    first.communicate()
    assert second.returncode == 5
    assert second.stderr.startswith(f"error: toy: process {first.pid} on ")
    assert second.stderr.endswith("(stage) is writing it; wait until it ends, or stop it, then rerun\n")
    assert second.stderr.count("\n") == 1


ORPHAN = """
import os, subprocess, sys, time
if len(sys.argv) == 2:  # the parent, in a process group of its own with its child, as `dvc` is
    child = subprocess.Popen([sys.executable, sys.argv[0], sys.argv[1], str(os.getpid())])
    time.sleep(1 if os.environ["PARENT"] == "ends" else 60)
else:
    while os.environ["PARENT"] == "ends" and os.getppid() == int(sys.argv[2]):
        time.sleep(0.01)
    sys.argv = sys.argv[1:2]
    exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("parent", ["ends", "lives"])
def test_a_stage_whose_parent_ended_before_it_could_ask_does_nothing(stage: Path, parent: str) -> None:
    """`dvc` was killed while Python started."""
    (stage.parent / "orphan.py").write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "toy", "PARENT": parent}
    process = subprocess.Popen(
        [sys.executable, "orphan.py", stage], cwd=stage.parent, env=environment, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == ("" if parent == "ends" else "at work\n")  # "": all that held it have ended
    assert (stage.parent / "data").exists() == (parent == "lives")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_rank_ends_when_dvc_ends_and_torchrun_lives_on(stage: Path) -> None:
    dvc = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    torchrun = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]], start_new_session=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", dvc, torchrun, stage], cwd=stage.parent, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DVC_STAGE": "toy", "TORCHELASTIC_RUN_ID": "toy",
             "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    time.sleep(1.5)  # it looked at least once, and stayed
    assert list((stage.parent / "data").iterdir())
    process.kill()
    _, said = process.communicate(timeout=60)
    assert said == "error: SIGTERM: stopped; `dvc repro` continues\n"
    assert not list((stage.parent / "data").iterdir())


@pytest.mark.parametrize("name", ["collect", "tokenize", "split", "train", "evaluate"])
def test_a_stage_imports_nothing_slow_before_it_asks_to_end_with_its_parent(name: str) -> None:
    code = f"import sys; before = set(sys.modules); import stages.{name}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {module for module in done.stdout.split() if module.startswith(("gptpipe", "stages"))}
    assert ours == {"gptpipe", "gptpipe.shell", "gptpipe.shell.process", "stages", f"stages.{name}"}
    assert not {"rich", "pydantic", "numpy", "torch"} & set(done.stdout.split())

"""The ordered map: same results whatever the number of processes, and no process outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sections import SHIPPED, tokenize_params

from gptpipe.base import parallel
from gptpipe.base.files import verify
from gptpipe.base.parallel import in_child, map_in_order
from gptpipe.collect import batch as shards
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.formats.corpus import shard_paths
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, ResourceError
from gptpipe.tokenize import encode
from gptpipe.tokenize.encode import tokenize

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
from gptpipe.base.parallel import map_in_order
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


COUNT = "range(100_000)"
VERIFY = "__import__('gptpipe.base.files').base.files.verify"
ME = "__import__('os').kill(__import__('os').getpid()"


def test_a_generator_in_another_process_gives_the_same() -> None:
    assert list(in_child("a", eval, COUNT)) == list(range(100_000))
    assert list(in_child("a", eval, "(__import__('os').getppid() for _ in 'a')")) != [os.getpid()]


def test_a_generator_in_another_process_ends_when_it_is_closed() -> None:
    endless = in_child("a", eval, "__import__('itertools').repeat(__import__('os').getpid())")
    child = next(endless)
    assert is_running(child)
    endless.close()
    assert not is_running(child)


@pytest.mark.parametrize(
    ("work", "error", "words"),
    [
        (f"iter({ME}, 6))", InputError, r"its reader crashed \(SIGABRT\)"),
        (f"iter({ME}, 11))", InputError, r"its reader crashed \(SIGSEGV\)"),
        (f"iter({ME}, 9))", ResourceError, "its reader was killed; if memory"),
        ("iter(__import__('os')._exit(7))", InputError, r"its reader crashed \(exit code 7\)"),
        ("iter(bytes(200 << 20))", InputError, "needs more than 100 MiB of memory to read"),
        (f"{VERIFY}(__import__('pathlib').Path('/a'))", IntegrityError, "manifest"),
        ("iter(1 / 0)", RuntimeError, "ZeroDivisionError"),
        ("iter(__import__('time').sleep(60))", InputError, "its reader has given nothing for 1 s"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_the_other_process(
    monkeypatch: pytest.MonkeyPatch, work: str, error: type[Exception], words: str
) -> None:
    """A native crash once ended the whole stage; it names the file now."""
    if "sleep" in work:
        monkeypatch.setattr(parallel, "_SILENCE", 1.0)
    with pytest.raises(error, match=words):
        list(in_child("a.parquet", eval, work, memory=100 << 20))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    """The generator's process, the server that it was forked from, and Python's tracker of resources."""
    program = """
from gptpipe.base.parallel import in_child
for child in in_child("a", eval, "iter(lambda: __import__('time').sleep(0.1) or __import__('os').getpid(), 0)"):
    print(child, __import__("multiprocessing.forkserver").forkserver._forkserver._forkserver_pid, flush=True)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert all(map(is_running, pids))
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A real cluster of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="needs the extra cluster")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray_gives_the_same_though_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    """The fourth of eight kills its worker with SIGKILL, the first time that it is tried."""
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.chdir(tmp_path)
    once = "__import__('os').mkdir('tried') or __import__('os').kill(__import__('os').getpid(), 9)"
    items = [str(i) for i in range(8)]
    items[3] = f"3 if __import__('os').path.exists('tried') else {once}"
    assert list(map_in_order(eval, items)) == list(range(8))
    assert (tmp_path / "tried").exists()


@pytest.mark.filterwarnings("default")
def test_tokenize_on_ray_gives_the_same_bytes_though_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    lines = "".join(f"document {i} of some {'long ' * (i % 50)}text\n" for i in range(2000))
    (tmp_path / "lines.txt").write_text(lines)
    source = {"kind": "text", "paths": (f"{tmp_path}/lines.txt",), "document": "line"}
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    collect(CollectParams.model_validate({**dict(SHIPPED.collect), "sources": (source,)}), tmp_path / "raw")
    assert len(shard_paths(tmp_path / "raw")) >= 6
    trained = tokenize_params(vocab_size=300)
    tokenize(tmp_path / "raw", tmp_path / "local", trained, SHIPPED.split.fractions, 1)

    def killing_once(shard: Path, **arguments: Any) -> dict[str, int]:
        if shard.name == "docs-00002.parquet" and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return really(shard, **arguments)

    really = encode._encode_shard_once
    monkeypatch.setattr(encode, "_encode_shard_once", killing_once)
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    tokenize(tmp_path / "raw", tmp_path / "ray", trained, SHIPPED.split.fractions, 1)
    assert (tmp_path / "killed").exists()
    assert verify(tmp_path / "ray").digest == verify(tmp_path / "local").digest


@pytest.mark.filterwarnings("default")
def test_errors_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> None:
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    with pytest.raises(IntegrityError, match=r"manifest\.json: No such file") as caught:
        list(map_in_order(verify, [tmp_path]))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ResourceError, match="a Ray task was lost"):
        list(map_in_order(os._exit, [9]))


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra cluster")
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused"):
        list(map_in_order(len, ["a"]))


def test_an_unknown_engine_or_none_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_ENGINE", "spark")
    with pytest.raises(ConfigError, match="GPTPIPE_ENGINE is 'spark'; set it to local or ray"):
        list(map_in_order(len, ["a"]))
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match=r"needs `ray`: pip install -e '\.\[cluster\]'"):
        list(map_in_order(len, ["a"]))

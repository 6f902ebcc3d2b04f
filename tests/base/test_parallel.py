"""map_in_order: the same results with any number of workers, in processes and on Ray; workers end with their parent."""

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
from processes import all_end
from sections import SHIPPED, tokenize_params

from gptpipe.base.manifest import verify
from gptpipe.base.parallel import map_in_order
from gptpipe.collect import batch as shards
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.formats.corpus import shard_paths
from gptpipe.shell.errors import ConfigError, IntegrityError, ResourceError
from gptpipe.tokenize import encode
from gptpipe.tokenize.encode import tokenize

# Workers import their function by name, so the tests use functions of installed modules.


@pytest.mark.parametrize("workers", ["1", "3"])
def test_results_have_the_order_of_the_items(monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", workers)
    items = [f"{i:x}" for i in range(20)]
    assert list(map_in_order(partial(int, base=16), items)) == list(range(20))
    assert list(map_in_order(partial(int, base=16), [])) == []


def test_work_runs_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    parents = set(map_in_order(eval, ["__import__('os').getppid()"] * 2))
    assert parents == {os.getpid()}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_error_in_a_worker_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
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
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the parent once left its workers waiting forever."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"])
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        workers = children_of(parent.pid)
    time.sleep(2)  # until the workers watch their parent
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert len(workers) == 2
    assert all_end(workers)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A real cluster of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="needs the extra cluster")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray_gives_the_same_results_when_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    """The first try of the fourth item kills its worker with SIGKILL."""
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.chdir(tmp_path)
    die_once = "__import__('os').mkdir('tried') or __import__('os').kill(__import__('os').getpid(), 9)"
    items = [str(i) for i in range(8)]
    items[3] = f"3 if __import__('os').path.exists('tried') else {die_once}"
    assert list(map_in_order(eval, items)) == list(range(8))
    assert (tmp_path / "tried").exists()


@pytest.mark.filterwarnings("default")
def test_tokenize_on_ray_gives_the_same_bytes_when_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    lines = "".join(f"document {i} of some {'long ' * (i % 50)}text\n" for i in range(2000))
    (tmp_path / "lines.txt").write_text(lines)
    source = {"kind": "text", "paths": (f"{tmp_path}/lines.txt",), "document": "line"}
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    params = CollectParams.model_validate({**dict(SHIPPED.collect), "dedup": "exact", "sources": (source,)})
    collect(params, tmp_path / "raw")
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
def test_errors_on_ray_are_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> None:
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    with pytest.raises(IntegrityError, match=r"manifest\.json: No such file") as caught:
        list(map_in_order(verify, [tmp_path]))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ResourceError, match="a Ray task was lost"):
        list(map_in_order(os._exit, [9]))


def test_an_unreachable_ray_cluster_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra cluster")
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"cannot connect to Ray at 127\.0\.0\.1:1: .*refused; check RAY_ADDRESS"):
        list(map_in_order(len, ["a"]))


def test_an_unknown_engine_or_a_missing_ray_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_ENGINE", "spark")
    with pytest.raises(ConfigError, match="GPTPIPE_ENGINE is 'spark'; set it to local or ray"):
        list(map_in_order(len, ["a"]))
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match=r"needs `ray`: pip install -e '\.\[cluster\]'"):
        list(map_in_order(len, ["a"]))

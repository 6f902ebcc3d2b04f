"""map_in_order: the same results with any number of workers, also on Ray; workers end with their parent."""

import importlib
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
from processes import all_end, is_running
from sections import SHIPPED, tokenize_params

from gptpipe.base.manifest import verify
from gptpipe.base.parallel import map_in_order
from gptpipe.collect import collect as collecting
from gptpipe.collect import parts, shards
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.formats.corpus import shard_paths
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, ResourceError
from gptpipe.split import split as stage_split
from gptpipe.split.split import split
from gptpipe.tokenize import encode
from gptpipe.tokenize.encode import tokenize

# Workers import their function by name, so the tests use functions of installed modules.
OWN_PID = "__import__('os').getpid()"


@pytest.mark.parametrize("workers", ["1", "3"])
def test_results_have_the_order_of_the_items(monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", workers)
    items = [f"{i:x}" for i in range(20)]
    assert list(map_in_order(partial(int, base=16), items)) == list(range(20))
    assert list(map_in_order(partial(int, base=16), [])) == []


def test_work_runs_in_other_processes_unless_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    items = [OWN_PID] * 2
    assert os.getpid() not in set(map_in_order(eval, items))
    assert set(map_in_order(eval, items, small=True)) == {os.getpid()}


def test_isolated_work_runs_in_another_process_even_for_one_item() -> None:
    (pid,) = map_in_order(eval, [OWN_PID], isolate=True)
    assert pid != os.getpid()
    assert list(map_in_order(eval, [OWN_PID])) == [os.getpid()]


@pytest.mark.parametrize("isolate", [False, True])
def test_at_most_two_items_per_worker_are_in_flight(monkeypatch: pytest.MonkeyPatch, isolate: bool) -> None:
    """Memory would grow with the number of items if they were all started, or all results kept."""
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    started = 0

    def items() -> Iterator[str]:
        nonlocal started
        for started in range(1, 101):
            yield str(started)

    results = map_in_order(int, items(), isolate=isolate)
    for n_read, result in enumerate(results, start=1):
        assert result == n_read
        assert started <= n_read + 2 * 2


def test_workers_have_the_variables_that_the_parent_has_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are forked from a server that was started with others."""
    for value in ("first", "second"):
        monkeypatch.setenv("SOME_VARIABLE", value)
        assert list(map_in_order(eval, ["__import__('os').environ['SOME_VARIABLE']"], isolate=True)) == [value]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_end_when_the_generator_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while they work on items that nobody will read."""
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    results = map_in_order(eval, [OWN_PID, *["__import__('time').sleep(60)"] * 5])
    worker = next(results)
    assert is_running(worker)
    start = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert not is_running(worker)
    assert time.monotonic() - start < 10


KILL_ME = "__import__('os').kill(__import__('os').getpid(), {})"
TIME_LIMIT = "__import__('gptpipe.base.limits').base.limits.time_limit"


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (KILL_ME.format(6), InputError, "its reader crashed (SIGABRT): the file is damaged; replace it"),
        (KILL_ME.format(7), InputError, "its reader crashed (SIGBUS): the file is damaged; replace it"),
        (KILL_ME.format(11), InputError, "its reader crashed (SIGSEGV): the file is damaged; replace it"),
        (KILL_ME.format(9), ResourceError, "its reader was killed; if memory is short, free some, then rerun"),
        (
            "__import__('os')._exit(7)",
            InputError,
            "its reader crashed (exit code 7): the file is damaged; replace it",
        ),
        (
            f"(lambda limit: (limit.__enter__(), __import__('time').sleep(60)))({TIME_LIMIT}(0.1))",
            InputError,
            "its reader does not progress: the file is damaged; replace it",
        ),
    ],
)
def test_a_crash_in_a_parser_names_the_file(
    monkeypatch: pytest.MonkeyPatch, work: str, error: type[Exception], message: str
) -> None:
    """With two workers and good items around it; the results before it are not lost."""
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    results = map_in_order(eval, ["1", "2", work, "4", "5"], parses=lambda item: f"file {item[:9]}")
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(error) as caught:
        next(results)
    assert str(caught.value) == f"file {work[:9]}: {message}"


def test_a_killed_worker_is_a_resource_error_that_names_the_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    with pytest.raises(ResourceError, match=r"a worker process was killed at item 2; .* lower GPTPIPE_WORKERS"):
        list(map_in_order(eval, ["1", KILL_ME.format(9)], describe=lambda item: f"item {1 + ('kill' in item)}"))
    with pytest.raises(ResourceError, match=r"a worker process ended at 9 \(exit code 9\)"):
        list(map_in_order(os._exit, [9, 9]))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_error_in_a_worker_is_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", workers)
    with pytest.raises(IntegrityError, match=r"manifest\.json: No such file"):
        list(map_in_order(verify, [tmp_path, tmp_path]))


def test_any_error_of_a_worker_has_its_class_and_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    with pytest.raises(ZeroDivisionError) as caught:
        list(map_in_order(eval, ["1 / 0", "1"]))
    assert "in _answer" in str(caught.value.__cause__)
    of_unknown_class = "(_ for _ in ()).throw(type('Unknown', (OSError,), {}))"  # it cannot be pickled
    with pytest.raises(RuntimeError, match="Unknown"):
        list(map_in_order(eval, [of_unknown_class, "1"]))


# Each of the two workers prints its process id and then works for a minute.
PROGRAM = """
from gptpipe.base.parallel import map_in_order
own_pid = "(__import__('time').sleep(0.5), __import__('os').getpid())[1]"
for pid in map_in_order(eval, [own_pid] * 2 + ["__import__('time').sleep(60)"] * 2):
    print(pid, __import__("multiprocessing.forkserver").forkserver._forkserver._forkserver_pid, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    """kill -9 of the parent once left its workers waiting forever. Ctrl-C reaches the whole process group.

    The program has no `if __name__ == "__main__"`, and its workers do not run it again.
    """
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    command = [sys.executable, tmp_path / "program.py"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout
        pids = [int(pid) for _ in range(2) for pid in parent.stdout.readline().split()]
        assert len(set(pids)) == 3  # two workers and the server
        if signum == signal.SIGINT:
            os.killpg(parent.pid, signum)
        else:
            os.kill(parent.pid, signum)
        _, errors = parent.communicate(timeout=20)
    assert parent.returncode == -signum
    assert errors.count("Traceback") == (signum == signal.SIGINT)  # of the parent, none of a worker
    assert all_end(pids)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A real cluster of two machines with one core, which are processes of this one."""
    ray = pytest.importorskip("ray", reason="needs the extra cluster")
    machine = {"num_cpus": 1, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_raylet_start_wait_time_s", "120")  # a busy machine starts it slowly
        cluster = importlib.import_module("ray.cluster_utils").Cluster(
            initialize_head=True, head_node_args=machine
        )
        cluster.second_machine = cluster.add_node(**machine)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.filterwarnings("default")  # Ray's own
@pytest.mark.slow
def test_ray_gives_the_same_results_when_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
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
@pytest.mark.slow
def test_the_data_stages_on_ray_give_the_same_bytes_when_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
) -> None:
    lines = "".join(f"document {i} of some {'long ' * (i % 50)}text\n" for i in range(2000))
    (tmp_path / "lines.txt").write_text(lines)
    source = {"kind": "text", "paths": (f"{tmp_path}/lines.txt",), "document": "line"}
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(parts, "PART_BYTES", 30_000)
    monkeypatch.setattr(collecting, "_MANY_BYTES", 0)
    params = CollectParams.model_validate({**dict(SHIPPED.collect), "dedup": "near", "sources": (source,)})
    collect(params, tmp_path / "raw")
    assert len(shard_paths(tmp_path / "raw")) >= 6
    trained = tokenize_params(vocab_size=270)
    monkeypatch.setattr(encode, "_SMALL_BYTES", 0)
    monkeypatch.setattr(stage_split, "_SMALL_BYTES", 0)
    tokenize(tmp_path / "raw", tmp_path / "local/tokens", trained, SHIPPED.split.fractions, 1)
    split(tmp_path / "local/tokens", tmp_path / "local/split", SHIPPED.split, 1)

    def killing_once(shard: Path, **arguments: Any) -> dict[str, int]:
        if shard.name == "docs-00002.parquet" and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return really(shard, **arguments)

    really = encode._encode_shard_once
    monkeypatch.setattr(encode, "_encode_shard_once", killing_once)
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    collect(params, tmp_path / "ray/raw")
    assert verify(tmp_path / "ray/raw").digest == verify(tmp_path / "raw").digest
    tokenize(tmp_path / "raw", tmp_path / "ray/tokens", trained, SHIPPED.split.fractions, 1)
    split(tmp_path / "ray/tokens", tmp_path / "ray/split", SHIPPED.split, 1)
    assert (tmp_path / "killed").exists()
    for folder in ("tokens", "split"):
        assert verify(tmp_path / "ray" / folder).digest == verify(tmp_path / "local" / folder).digest


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_errors_on_ray_are_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
) -> None:
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    with pytest.raises(IntegrityError, match=r"manifest\.json: No such file") as caught:
        list(map_in_order(verify, [tmp_path, tmp_path]))
    assert "Traceback" not in str(caught.value)
    items = ["1", "__import__('os')._exit(9)"]
    with pytest.raises(ResourceError, match="a Ray task was lost at item 2: "):
        list(map_in_order(eval, items, describe=lambda item: f"item {1 + items.index(item)}"))
    with pytest.raises(
        InputError, match=r"^a\.parquet: its reader crashed 4 times: the file is damaged; replace it"
    ):
        list(map_in_order(eval, items, parses=lambda _: "a.parquet"))


@pytest.mark.filterwarnings("default")
def test_small_work_and_single_items_are_not_sent_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """To connect takes seconds. Here it would fail."""
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert list(map_in_order(len, ["a"])) == [1]
    assert list(map_in_order(len, ["a", "b"], small=True)) == [1, 1]


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_closing_the_generator_ends_the_tasks_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
) -> None:
    """They may be writing into a folder that is about to be removed."""
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.chdir(tmp_path)
    write_for_long = "[(__import__('time').sleep(0.1), open('beat', 'a').write('x')) for _ in range(600)]"
    results = map_in_order(eval, ["1", *[write_for_long] * 3])
    assert next(results) == 1
    deadline = time.monotonic() + 60
    while not Path("beat").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    results.close()  # type: ignore[attr-defined]
    size = Path("beat").stat().st_size
    time.sleep(0.5)
    assert Path("beat").stat().st_size == size > 0


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_ray_gives_the_same_results_when_a_machine_is_lost(
    monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
) -> None:
    """The last test with this cluster, which has one machine less afterwards."""
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    machine = "__import__('ray').get_runtime_context().get_node_id()"
    items = [f"({i}, __import__('time').sleep(0.2), {machine})" for i in range(40)]
    results = map_in_order(eval, items)
    first: list[Any] = []
    while len({machine_of for *_, machine_of in first}) < 2:  # a busy machine starts late
        first.append(next(results))
    ray_cluster.remove_node(ray_cluster.second_machine, allow_graceful=False)
    last = list(results)
    assert [i for i, *_ in [*first, *last]] == list(range(40))
    assert len({machine_of for *_, machine_of in last[-4:]}) == 1


def test_an_unreachable_ray_cluster_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra cluster")
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ResourceError, match=r"cannot connect to Ray at 127\.0\.0\.1:1: .*refused; check RAY_ADDRESS"
    ):
        list(map_in_order(len, ["a", "b"]))


def test_an_unknown_engine_or_a_missing_ray_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTPIPE_ENGINE", "spark")
    with pytest.raises(ConfigError, match="GPTPIPE_ENGINE is 'spark'; set it to local or ray"):
        list(map_in_order(len, ["a", "b"]))
    monkeypatch.setenv("GPTPIPE_ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match=r"needs `ray`: pip install -e '\.\[cluster\]'"):
        list(map_in_order(len, ["a", "b"]))

"""Tests of the harness: its faults have the described effect, and its checks can fail."""

import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import pytest

from campaign.checks import broken_promises_of_files, leftovers, unsound
from campaign.damage import WAYS, damage
from campaign.faults import Counters, Fault, install, read_trace
from campaign.powercut import MODES, cut_power
from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import new_folder, verify

WRITERS = {
    "as the project does": lambda path: write_bytes(path, b"content"),
    "without fsync": lambda path: _write(path, sync_file=False),
    "without fsync of the folder": lambda path: _write(path, sync_folder=False),
    "under its final name": lambda path: path.write_bytes(b"content"),
}


def _write(path: Path, *, sync_file: bool = True, sync_folder: bool = True) -> None:
    temporary = path.with_name("temporary")
    with temporary.open("wb") as file:
        file.write(b"content")
        file.flush()
        if sync_file:
            os.fsync(file.fileno())
    temporary.replace(path)
    if sync_folder:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def in_a_fork(act: object, fault: Fault, root: Path, trace: Path | None = None) -> tuple[int, int]:
    """The exit code of a process that acts under a fault (1 for an OSError), and its number of operations."""
    counters = Counters()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            install(fault, root, counters, trace)
            act()  # type: ignore[operator]
            code = 0
        except OSError:
            pass
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), counters.operations


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/data").mkdir(parents=True)
    return tmp_path / "root"


def contents_after_cuts(root: Path, file: str, name: str, after: int) -> set[bytes | None]:
    """What `file` may contain after a power cut at operation `after`; None if it does not exist."""
    before, killed, trace = (root.parent / other for other in ("before", "killed", "trace"))
    for folder in (root, before, killed):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (root, before):
        (folder / "data").mkdir(parents=True)
    in_a_fork(partial(WRITERS[name], root / file), Fault("cut", after), root, trace)
    root.rename(killed)
    contents = set()
    for mode in MODES:
        for seed in range(8):
            shutil.copytree(killed, root)
            cut_power(root, before, read_trace(trace), mode, random.Random(seed))
            contents.add((root / file).read_bytes() if (root / file).exists() else None)
            shutil.rmtree(root)
    root.mkdir()
    return contents


@pytest.mark.parametrize("file", ["data/file", "file"])
def test_a_power_cut_reveals_each_wrong_way_to_write_a_file(root: Path, file: str) -> None:
    """Only the project's way is atomic at every moment, and durable afterwards."""
    outcomes = {}
    for name, write in WRITERS.items():
        _, n = in_a_fork(partial(write, root / file), Fault(), root)
        during = set().union(*(contents_after_cuts(root, file, name, at) for at in range(1, n + 1)))
        outcomes[name] = (during <= {None, b"content"}, contents_after_cuts(root, file, name, n + 1))
        (root / "data").mkdir()
    assert outcomes["as the project does"] == (True, {b"content"})
    assert outcomes["without fsync of the folder"] == (True, {None, b"content"})
    assert not outcomes["without fsync"][0]
    assert not outcomes["under its final name"][0]


def test_a_finished_folder_verifies_after_a_power_cut(root: Path) -> None:
    """Records and half-written files were removed without a sync, and were back in the finished folder."""

    def build() -> None:
        with new_folder(root / "data/raw", {}, "key") as folder:
            write_bytes(folder.path / "text", b"content")
            for name in (".text.done", ".parts/one"):
                write_bytes(folder.path / name, b"what only an interrupted build needs")

    before, trace = root.parent / "before", root.parent / "trace"
    shutil.copytree(root, before)
    _, n_operations = in_a_fork(build, Fault(), root)
    n_finished = 0
    for at in range(1, n_operations + 1):
        for mode in MODES:
            shutil.rmtree(root)
            shutil.copytree(before, root)
            in_a_fork(build, Fault("cut", at), root, trace)
            cut_power(root, before, read_trace(trace), mode, random.Random(at))
            if (root / "data/raw").exists():
                n_finished += 1
                assert list(verify(root / "data/raw").files) == ["text"]
    assert n_finished > 0


def test_every_operation_is_counted_once(root: Path) -> None:
    """Five operations: open, write, fsync, rename, fsync of the folder. A kill is possible before each."""

    def act() -> None:
        write_bytes(root / "data/file", b"content")

    code, n_operations = in_a_fork(act, Fault(), root)
    assert (code, n_operations) == (0, 5)
    (root / "data/file").unlink()
    for at in range(1, 6):
        assert in_a_fork(act, Fault("signal", at, ("SIGKILL",)), root)[0] == -9
        assert (root / "data/file").exists() == (at == 5)
    assert in_a_fork(act, Fault("signal", 6, ("SIGKILL",)), root)[0] == 0


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("how", ["fail", "short"])
def test_every_operation_can_fail(root: Path, how: str, error: str) -> None:
    from gptpipe.shell.errors import ResourceError

    def act() -> None:
        try:
            write_bytes(root / "data/file", b"content")
        except ResourceError as failed:
            raise OSError from failed

    for at in range(1, 6):
        assert in_a_fork(act, Fault(how, at, error=error), root)[0] == 1
        assert leftovers(root) == set()


def test_every_kind_of_damage_changes_the_folder(tmp_path: Path) -> None:
    for way in WAYS:
        folder = tmp_path / way
        older = folder / "older"
        older.mkdir(parents=True)
        (folder / "a.json").write_text('{"a": 1}')
        (folder / "b.json").write_text('{"a": 22}')
        (older / "a.json").write_text('{"a": 3}')
        assert damage(folder / "a.json", way, random.Random(1), older / "a.json")
        before = {"a.json": '{"a": 1}', "b.json": '{"a": 22}'}
        assert {
            file.name: file.read_text(errors="replace") for file in folder.iterdir() if file.is_file()
        } != before


def test_the_checks_report_what_is_wrong(root: Path) -> None:
    with new_folder(root / "data/raw", {}) as folder:
        write_bytes(folder.path / "a", b"content")
    manifest = root / "data/raw/manifest.json"
    good = manifest.read_bytes()
    assert unsound(root) == []
    (root / "data/raw/a").write_bytes(b"contents")
    assert unsound(root) == ["I1: data/raw/a: differs from its manifest"]
    (root / "data/raw/a").write_bytes(b"content")
    manifest.write_bytes(json.dumps({**json.loads(good), "files": {}}).encode())
    assert unsound(root) == ["I1: data/raw: other files than in its manifest"]
    manifest.write_bytes(good)
    (root / "data/.raw.partial").mkdir()
    assert leftovers(root) == {"data/.raw.partial"}
    assert broken_promises_of_files(root, {}) == [
        "I2: data/raw/a: unexpected",
        "I2: data/raw/manifest.json: unexpected",
        "I4: left behind: data/.raw.partial",
    ]

"""Durable files: whole or not at all, whatever the disk does and whenever the process dies."""

import errno
import io
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gptpipe.base.files import new_file, seal, sha256_of, to_json, unseal, write_bytes, write_json
from gptpipe.base.manifest import check_parent, new_folder, read_manifest, verify
from gptpipe.base.parquet import new_parquet
from gptpipe.base.resume import finished, once
from gptpipe.shell.errors import IntegrityError, ResourceError


class Abort(Exception):
    """Raised inside a build to give it up."""


def build(target: Path, text: bytes) -> None:
    with new_folder(target, {"sources": "digest of the sources"}) as folder:
        write_bytes(folder.path / "one.txt", text)
        write_bytes(folder.path / "sub" / "two.txt", text * 2)
        with new_parquet(folder.path / "rows.parquet", pa.schema([("text", pa.string())])) as rows:
            rows.extend(pa.RecordBatch.from_pydict({"text": [text.decode()]}))
        folder.counts = {"documents": 2}


def give_up(target: Path) -> None:
    """The next start after a crash, which itself comes to nothing."""
    with suppress(Abort), new_folder(target, {}):
        raise Abort


@contextmanager
def failing_disk(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], None]) -> Iterator[None]:
    """Calls `fails` with a running number before each operation on the disk; a failing write is a short one."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        fails(count)

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            step()
            return operation(*arguments, **options)

        return call

    class File(io.FileIO):
        def write(self, content: Any, /) -> int:
            try:
                step()
            except OSError:
                super().write(bytes(content)[: len(content) // 2])
                raise
            return super().write(content)

    really_open = Path.open

    def open_path(path: Path, mode: str = "r", **options: Any) -> Any:
        return io.BufferedWriter(File(path, "w")) if mode == "wb" else really_open(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_path)
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.partial")]


def test_a_file_holds_what_was_written_and_its_folder_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"b": [1, "ü"], "a": None})
    assert (tmp_path / "new" / "a.json").read_bytes() == '{\n  "a": null,\n  "b": [\n    1,\n    "ü"\n  ]\n}\n'.encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may drop what was not synced: the content comes first, then the name, then the folder's list."""
    steps: list[tuple[str, str]] = []
    really_sync, really_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        steps.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        really_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        steps.append(("rename", Path(target).name))
        really_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_bytes(tmp_path / "a.txt", b"text")
    assert steps == [("sync", ".a.txt.partial"), ("rename", "a.txt"), ("sync", tmp_path.name)]


def test_a_folder_made_from_another_parent_is_refused(tmp_path: Path) -> None:
    with new_folder(tmp_path / "raw", {}) as raw:
        write_bytes(raw.path / "a", b"old")
    with new_folder(tmp_path / "tokens", read_manifest(tmp_path / "raw").lineage("raw")) as tokens:
        write_bytes(tokens.path / "b", b"made from old")
    check_parent(tmp_path / "tokens", tmp_path / "raw")
    with new_folder(tmp_path / "raw", {}) as raw:
        write_bytes(raw.path / "a", b"new")
    with pytest.raises(IntegrityError, match="made from another"):
        check_parent(tmp_path / "tokens", tmp_path / "raw")


def test_a_file_given_up_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with suppress(Abort), new_file(path) as file:
        file.write(b"new")
        file.flush()
        raise Abort
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json({"loss": float("nan")})


def test_a_manifest_names_files_counts_and_ancestors(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"text")
    manifest = verify(target)
    assert manifest == read_manifest(target)
    assert manifest.made_from == {"sources": "digest of the sources"}
    assert manifest.counts == {"documents": 2}
    assert list(manifest.files) == ["one.txt", "rows.parquet", "sub/two.txt"]
    # echo -n text | sha256sum
    assert manifest.files["one.txt"].sha256 == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    assert manifest.files["sub/two.txt"].n_bytes == 8
    assert manifest.digest == sha256_of(target / "manifest.json")
    assert manifest.lineage("raw") == {"sources": "digest of the sources", "raw": manifest.digest}


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "a", b"text")
    build(tmp_path / "b", b"text")
    assert verify(tmp_path / "a").digest == verify(tmp_path / "b").digest


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"some text")
    random_ = random.Random(0)
    for name in verify(target).files:
        content = (target / name).read_bytes()
        for _ in range(30):
            damaged = bytearray(content)
            damaged[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
            (target / name).write_bytes(damaged)
            with pytest.raises(IntegrityError, match=f"{name}: differs"):
                verify(target)
        (target / name).write_bytes(content)
    verify(target)


def test_truncated_missing_and_added_files_are_found(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"some text")
    (target / "one.txt").write_bytes(b"some tex")
    with pytest.raises(IntegrityError, match=r"one\.txt: differs"):
        verify(target)
    (target / "one.txt").unlink()
    with pytest.raises(IntegrityError, match=r"one\.txt: is missing"):
        verify(target)
    (target / "one.txt").write_bytes(b"some text")
    (target / "sub" / "more.txt").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"more\.txt: is not in the manifest"):
        verify(target)
    (target / "sub" / "more.txt").unlink()
    verify(target)


def test_swapped_files_are_found(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"some text")
    (target / "one.txt").replace(tmp_path / "other")
    (target / "sub" / "two.txt").replace(target / "one.txt")
    (tmp_path / "other").replace(target / "sub" / "two.txt")
    with pytest.raises(IntegrityError, match=r"one\.txt: differs"):
        verify(target)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"{}", "damaged"),
        (b"[]", "damaged"),
        (b"\xff", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"schema_version": 2, "made_from": {}, "counts": {}, "files": {}}', "damaged"),  # no digest of its own
        (seal({"schema_version": "2", "made_from": {}, "counts": {}, "files": {}}), "damaged"),
        (b'{"schema_version": 1, "made_from": {}, "counts": {}, "files": {}}', "schema 1, this version reads 2"),
        (None, "No such file"),
    ],
)
def test_a_bad_manifest_is_an_integrity_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        verify(tmp_path)


def test_a_stale_manifest_is_found(tmp_path: Path) -> None:
    build(tmp_path / "old", b"old")
    build(tmp_path / "new", b"new")
    (tmp_path / "old" / "manifest.json").replace(tmp_path / "new" / "manifest.json")
    with pytest.raises(IntegrityError, match=r"new/one\.txt: differs"):
        verify(tmp_path / "new")


def test_a_file_in_place_of_a_folder_is_an_integrity_error(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"")
    with pytest.raises(IntegrityError, match="Not a directory"):
        verify(tmp_path / "raw")


def test_a_folder_given_up_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"old")
    with suppress(Abort), new_folder(target, {}) as folder:
        write_bytes(folder.path / "one.txt", b"new")
        raise Abort
    assert (target / "one.txt").read_bytes() == b"old"
    verify(target)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("code", "for_ever"), [(errno.ENOSPC, False), (errno.EIO, True)])
def test_every_operation_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, for_ever: bool) -> None:
    """The k-th operation on the disk fails, for each k: ResourceError, the old folder or the new one, both whole."""
    target = tmp_path / "raw"
    build(target, b"old")
    k, reached, messages = 0, 0, []
    while reached >= k:
        k, reached, n_before = k + 1, 0, len(messages)

        def fail(number: int, k: int = k) -> None:
            nonlocal reached
            reached = number
            if number == k or (for_ever and number > k):
                raise OSError(code, os.strerror(code))

        with failing_disk(monkeypatch, fail):
            try:
                build(target, b"new")
            except ResourceError as error:
                messages.append(str(error))
        failed = len(messages) > n_before
        if failed and for_ever:
            give_up(target)  # a disk that lets nothing be renamed leaves the clearing up to the next start
        verify(target)
        assert (target / "one.txt").read_bytes() in ((b"old", b"new") if failed else (b"new",))
        give_up(target)
        assert leftovers(tmp_path) == []
        build(target, b"old")
    assert len(messages) > 25  # the operations were really counted
    for message in messages:
        assert message.startswith(str(tmp_path))
        assert os.strerror(code) in message


def test_kill_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kill -9 before the k-th operation, for each k: what is to be seen is whole, and the next start clears up."""
    target = tmp_path / "raw"
    build(target, b"old")
    k = 0
    code = 9
    while code == 9:
        k += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the child only touches files
            child = os.fork()
        if child == 0:
            with failing_disk(monkeypatch, lambda number, k=k: os._exit(9) if number == k else None):
                build(target, b"new")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if target.exists():
            verify(target)
        give_up(target)
        verify(target)
        assert leftovers(tmp_path) == []
        if (target / "one.txt").read_bytes() == b"new":
            build(target, b"old")
    assert k > 30
    assert code == 0


def test_a_half_removed_predecessor_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it removed the old folder, the new one gone since (DVC removes outs): nothing is left to restore."""
    target = tmp_path / "raw"
    build(target, b"old")

    def remove_one_file(folder: Path) -> None:
        (folder / "one.txt").unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", remove_one_file)
        with pytest.raises(ResourceError):
            build(target, b"new")
    assert (target / "one.txt").read_bytes() == b"new"
    target.replace(tmp_path / "elsewhere")
    give_up(target)
    assert not target.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_file_size_limit_is_a_resource_error(tmp_path: Path) -> None:
    """A real limit of the kernel, in a process of its own."""
    program = """
import resource, sys
from pathlib import Path
from gptpipe.shell.errors import ResourceError
from gptpipe.base.files import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), bytes(5000))
except ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    path = tmp_path / "large"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (5, "")
    assert done.stdout.startswith(f"{path}: cannot write: File too large (it needs 5,000 bytes); free space")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(ResourceError, match="data/raw: cannot write: Not a directory"):
        build(tmp_path / "data" / "raw", b"text")


def test_manifests_are_plain_json(tmp_path: Path) -> None:
    build(tmp_path / "raw", b"text")
    content = json.loads((tmp_path / "raw" / "manifest.json").read_bytes())
    assert sorted(content) == ["counts", "files", "made_from", "schema_version", "sha256"]


def test_every_change_of_a_manifest_is_found(tmp_path: Path) -> None:
    """Of its counts and ancestors too, which no file of the folder can confirm."""
    target = tmp_path / "raw"
    build(target, b"some text")
    path = target / "manifest.json"
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(IntegrityError, match=r"manifest\.json: (damaged|schema \d+)"):
            verify(target)
    path.write_bytes(content.replace(b'"documents": 2', b'"documents": 3'))
    with pytest.raises(IntegrityError, match=r"manifest\.json: damaged"):
        verify(target)
    path.write_bytes(content + b" ")
    with pytest.raises(IntegrityError, match=r"manifest\.json: damaged"):
        verify(target)


def test_a_seal_holds_for_equal_bytes_only() -> None:
    content = {"b": [1, 2.5, "ü"], "a": {"x": None}}
    assert unseal(seal(content)) == content
    for damaged in (seal(content)[:-1], seal(content).replace(b"2.5", b"2.6"), b'{"sha256": "0"}', b"7", b"\xff", b""):
        with pytest.raises(ValueError, match=r"."):
            unseal(damaged)


def test_leftovers_of_a_killed_build_are_no_content(tmp_path: Path) -> None:
    """A kill while the manifest was written made every later `dvc repro` fail."""
    left = tmp_path / ".raw.key.partial"
    for name in (".manifest.json.partial", "sub/.two.txt.partial", "sub/.folder.partial/file"):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).write_bytes(b"half")
    (left / "one.txt").write_bytes(b"text")
    with new_folder(tmp_path / "raw", {}, "key"):
        pass
    assert list(verify(tmp_path / "raw").files) == ["one.txt"]
    assert leftovers(tmp_path) == []


def test_notes_of_finished_files_are_no_content(tmp_path: Path) -> None:
    with new_folder(tmp_path / "raw", {}, "key") as folder:
        once([folder.path / "a"], lambda: write_bytes(folder.path / "a", b"text"))
    assert sorted(verify(tmp_path / "raw").files) == ["a"]
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["a", "manifest.json"]


def test_a_damaged_note_of_finished_files_counts_as_none(tmp_path: Path) -> None:
    path, note = tmp_path / "shard", tmp_path / ".shard.done"

    def make() -> int:
        path.write_bytes(b"rows")
        return 12

    assert once([path], make) == 12
    assert finished([path])["result"] == 12
    note.write_bytes(note.read_bytes().replace(b"12", b"13"))
    assert finished([path]) == {}


HOLDER = """
import sys, time
from pathlib import Path
from gptpipe.shell.locks import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held(target: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock of `target` for some seconds."""
    command = [sys.executable, "-c", HOLDER, target, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder
        holder.kill()


def test_a_second_writer_is_refused_in_seconds_and_names_the_first(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"old")
    with held(target, 60) as holder:
        started = time.monotonic()
        with pytest.raises(ResourceError, match=rf"raw: process {holder.pid} on .* is writing it; wait until it ends"):
            build(target, b"new")
        assert time.monotonic() - started < 5
    assert (target / "one.txt").read_bytes() == b"old"
    build(target, b"new")  # a killed holder holds nothing
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_second_writer_waits_for_one_that_is_about_to_end(tmp_path: Path) -> None:
    with held(tmp_path / "raw", 0.5):
        build(tmp_path / "raw", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_many_writers_write_one_after_the_other(tmp_path: Path) -> None:
    """The lock file is removed at each release, which must not let two in at once."""
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

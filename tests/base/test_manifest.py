"""Folders with a manifest: complete whatever the disk does, whenever the process ends; damage is detected."""

import errno
import io
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gptpipe.base import manifest as manifest_module
from gptpipe.base.files import seal, sha256_of, write_bytes
from gptpipe.base.manifest import check_parent, new_folder, read_manifest, verify
from gptpipe.base.parquet import new_parquet
from gptpipe.shell.errors import IntegrityError, ResourceError


class Abort(Exception):
    """Raised inside a build to abort it."""


def build(target: Path, text: bytes) -> None:
    with new_folder(target, {"sources": "digest of the sources"}) as folder:
        write_bytes(folder.path / "one.txt", text)
        write_bytes(folder.path / "sub" / "two.txt", text * 2)
        with new_parquet(folder.path / "rows.parquet", pa.schema([("text", pa.string())])) as rows:
            rows.extend(pa.RecordBatch.from_pydict({"text": [text.decode()]}))
        folder.counts = {"documents": 2}


def abort_build(target: Path) -> None:
    """Start a build after a crash, and abort it too."""
    with suppress(Abort), new_folder(target, {}):
        raise Abort


@contextmanager
def failing_disk(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], None]) -> Iterator[None]:
    """Call `fails` with a running number before each disk operation. A write that fails writes only half."""
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


def test_a_folder_made_from_another_parent_is_rejected(tmp_path: Path) -> None:
    with new_folder(tmp_path / "raw", {}) as raw:
        write_bytes(raw.path / "a", b"old")
    with new_folder(tmp_path / "tokens", read_manifest(tmp_path / "raw").lineage("raw")) as tokens:
        write_bytes(tokens.path / "b", b"made from old")
    check_parent(tmp_path / "tokens", tmp_path / "raw")
    with new_folder(tmp_path / "raw", {}) as raw:
        write_bytes(raw.path / "a", b"new")
    with pytest.raises(IntegrityError, match="made from another"):
        check_parent(tmp_path / "tokens", tmp_path / "raw")


def test_worker_processes_find_the_same_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_SMALL_BYTES", 0)
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    build(tmp_path / "raw", b"text")
    assert verify(tmp_path / "raw", in_workers=True) == read_manifest(tmp_path / "raw")
    (tmp_path / "raw/sub/two.txt").write_bytes(b"texttexT")
    with pytest.raises(IntegrityError, match=r"sub/two\.txt: differs from its manifest"):
        verify(tmp_path / "raw", in_workers=True)


def test_a_manifest_lists_files_counts_and_ancestors(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"text")
    manifest = verify(target)
    assert manifest == read_manifest(target)
    assert manifest.made_from == {"sources": "digest of the sources"}
    assert manifest.counts == {"documents": 2}
    assert list(manifest.files) == ["one.txt", "rows.parquet", "sub/two.txt"]
    # echo -n text | sha256sum
    assert (
        manifest.files["one.txt"].sha256 == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    )
    assert manifest.files["sub/two.txt"].n_bytes == 8
    assert manifest.digest == sha256_of(target / "manifest.json")
    assert manifest.lineage("raw") == {"sources": "digest of the sources", "raw": manifest.digest}


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "a", b"text")
    build(tmp_path / "b", b"text")
    assert verify(tmp_path / "a").digest == verify(tmp_path / "b").digest


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
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


def test_truncated_missing_and_added_files_are_detected(tmp_path: Path) -> None:
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


def test_swapped_files_are_detected(tmp_path: Path) -> None:
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
        # Without its SHA-256.
        (b'{"schema_version": 2, "made_from": {}, "counts": {}, "files": {}}', "damaged"),
        (seal({"schema_version": "2", "made_from": {}, "counts": {}, "files": {}}), "damaged"),
        (
            b'{"schema_version": 1, "made_from": {}, "counts": {}, "files": {}}',
            "schema 1, this version reads 2",
        ),
        (None, "No such file"),
    ],
)
def test_an_invalid_manifest_is_an_integrity_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        verify(tmp_path)


def test_a_stale_manifest_is_detected(tmp_path: Path) -> None:
    build(tmp_path / "old", b"old")
    build(tmp_path / "new", b"new")
    (tmp_path / "old" / "manifest.json").replace(tmp_path / "new" / "manifest.json")
    with pytest.raises(IntegrityError, match=r"new/one\.txt: differs"):
        verify(tmp_path / "new")


def test_a_file_in_place_of_a_folder_is_an_integrity_error(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"")
    with pytest.raises(IntegrityError, match="Not a directory"):
        verify(tmp_path / "raw")


def test_an_aborted_build_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    build(target, b"old")
    with suppress(Abort), new_folder(target, {}) as folder:
        write_bytes(folder.path / "one.txt", b"new")
        raise Abort
    assert (target / "one.txt").read_bytes() == b"old"
    verify(target)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("code", "permanent"), [(errno.ENOSPC, False), (errno.EIO, True)])
def test_a_folder_is_complete_whichever_disk_operation_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, permanent: bool
) -> None:
    """The k-th disk operation fails, for each k. Then either the old or the new folder is there, complete."""
    target = tmp_path / "raw"
    build(target, b"old")
    messages: list[str] = []
    k = 0
    n_operations = 0  # of the last build
    while n_operations >= k:
        k += 1
        n_operations = 0
        message = ""

        def fail(number: int, k: int = k) -> None:
            nonlocal n_operations
            n_operations = number
            if number == k or (permanent and number > k):
                raise OSError(code, os.strerror(code))

        with failing_disk(monkeypatch, fail):
            try:
                build(target, b"new")
            except ResourceError as error:
                message = str(error)
                messages.append(message)
        if message and permanent:
            abort_build(target)  # nothing could be renamed, so the next build cleans up
        verify(target)
        content = (target / "one.txt").read_bytes()
        assert content == b"new" or (message and content == b"old")
        abort_build(target)
        assert leftovers(tmp_path) == []
        build(target, b"old")
    assert len(messages) > 25  # the disk operations were really counted
    for message in messages:
        assert message.startswith(str(tmp_path))
        assert os.strerror(code) in message


def test_a_folder_is_complete_after_a_kill_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends before the k-th disk operation, for each k. The next build cleans up."""
    target = tmp_path / "raw"
    build(target, b"old")
    k = 0
    code = 9
    while code == 9:
        k += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads; the child only uses files
            child = os.fork()
        if child == 0:
            with failing_disk(monkeypatch, lambda number, k=k: os._exit(9) if number == k else None):
                build(target, b"new")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if target.exists():
            verify(target)
        abort_build(target)
        verify(target)
        assert leftovers(tmp_path) == []
        if (target / "one.txt").read_bytes() == b"new":
            build(target, b"old")
    assert k > 30
    assert code == 0


def test_a_partly_removed_old_folder_is_never_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build is killed as it removes the old folder, and DVC removes the new one: nothing may be restored."""
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
    abort_build(target)
    assert not target.exists()
    assert leftovers(tmp_path) == []


def test_a_file_in_place_of_a_parent_folder_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(ResourceError, match="data/raw: cannot write: Not a directory"):
        build(tmp_path / "data" / "raw", b"text")


def test_a_manifest_is_plain_json(tmp_path: Path) -> None:
    build(tmp_path / "raw", b"text")
    content = json.loads((tmp_path / "raw" / "manifest.json").read_bytes())
    assert sorted(content) == ["counts", "files", "made_from", "schema_version", "sha256"]


def test_every_change_of_a_manifest_is_detected(tmp_path: Path) -> None:
    """Also a change of counts and ancestors, which no file of the folder confirms."""
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


def test_leftovers_of_a_killed_build_are_not_content(tmp_path: Path) -> None:
    """A kill during the writing of the manifest once made every later `dvc repro` fail."""
    left = tmp_path / ".raw.key.partial"
    for name in (".manifest.json.partial", "sub/.two.txt.partial", "sub/.folder.partial/file"):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).write_bytes(b"half")
    (left / "one.txt").write_bytes(b"text")
    with new_folder(tmp_path / "raw", {}, "key"):
        pass
    assert list(verify(tmp_path / "raw").files) == ["one.txt"]
    assert leftovers(tmp_path) == []

"""Records of finished files."""

import hashlib
from pathlib import Path

import pytest

from gptpipe.base import manifest
from gptpipe.base.files import sha256_of, write_bytes
from gptpipe.base.manifest import new_folder, verify
from gptpipe.base.resume import finished, once


def test_records_of_finished_files_are_not_content(tmp_path: Path) -> None:
    with new_folder(tmp_path / "raw", {}, "key") as folder:
        once([folder.path / "a"], lambda: write_bytes(folder.path / "a", b"text"))
    assert sorted(verify(tmp_path / "raw").files) == ["a"]
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["a", "manifest.json"]


def test_a_damaged_record_is_ignored(tmp_path: Path) -> None:
    path, record = tmp_path / "shard", tmp_path / ".shard.done"

    def make() -> int:
        path.write_bytes(b"rows")
        return 12

    assert once([path], make) == 12
    assert finished([path])["result"] == 12
    record.write_bytes(record.read_bytes().replace(b"12", b"13"))
    assert finished([path]) == {}


def test_a_manifest_takes_digests_from_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has read the file already. A file without a record, or with a damaged one, is read."""
    read: list[str] = []
    monkeypatch.setattr(manifest, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    with new_folder(tmp_path / "raw", {}, "key") as folder:
        for name in ("sub/a", "sub/b"):
            path = folder.path / name
            once([path], lambda path=path, name=name: write_bytes(path, name.encode()))
        write_bytes(folder.path / "c", b"c")
        record = folder.path / "sub/.b.done"
        record.write_bytes(record.read_bytes().replace(b"null", b"true"))
    assert read == ["c", "b"]
    assert {name: entry.sha256 for name, entry in verify(tmp_path / "raw").files.items()} == {
        name: hashlib.sha256(name.encode()).hexdigest() for name in ("sub/a", "sub/b", "c")
    }


def test_a_file_that_was_made_from_something_else_is_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "shard", list[str]()

    def make(key: str) -> None:
        once([path], lambda: made.append(key) or path.write_bytes(b"rows"), key)

    for key in ("one", "one", "two"):
        make(key)
    assert made == ["one", "two"]

"""Records of finished files."""

from pathlib import Path

from gptpipe.base.files import write_bytes
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

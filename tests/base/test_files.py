"""Single files: complete and durable, or not there at all."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from gptpipe.base.files import new_file, seal, to_json, unseal, write_bytes, write_json


class Abort(Exception):
    """Raised inside a build to abort it."""


def test_a_file_has_the_written_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"b": [1, "ü"], "a": None})
    written = (tmp_path / "new" / "a.json").read_bytes()
    assert written == '{\n  "a": null,\n  "b": [\n    1,\n    "ü"\n  ]\n}\n'.encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut loses what is not synced, so content is synced before the renaming, and the name after it."""
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


def test_an_aborted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with suppress(Abort), new_file(path) as file:
        file.write(b"new")
        file.flush()
        raise Abort
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_file_size_limit_is_a_resource_error(tmp_path: Path) -> None:
    """A real limit of the kernel, in another process."""
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


def test_json_rejects_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json({"loss": float("nan")})


def test_unseal_accepts_unchanged_bytes_only() -> None:
    content = {"b": [1, 2.5, "ü"], "a": {"x": None}}
    assert unseal(seal(content)) == content
    for damaged in (
        seal(content)[:-1],
        seal(content).replace(b"2.5", b"2.6"),
        b'{"sha256": "0"}',
        b"7",
        b"\xff",
        b"",
    ):
        with pytest.raises(ValueError, match=r"."):
            unseal(damaged)

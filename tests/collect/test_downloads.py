"""Downloads from a real server that misbehaves: the complete file, or nothing and the right exit code."""

import hashlib
import http.server
import importlib
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reading import read_source

from gptpipe.collect import downloads
from gptpipe.collect.collect import collect
from gptpipe.collect.downloads import download
from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import find_files
from gptpipe.collect.tables import DatasetName, dataset_rows
from gptpipe.shell.errors import GptpipeError, InputError, IntegrityError, ResourceError

MakeParams = Callable[..., CollectParams]
BODY = b"".join(b"line %d\n" % i for i in range(20_000))
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers each request as the next of its scripts says; the last script is repeated."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = ["whole"]
        self.asked: list[str | None] = []  # the Range of each request


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        script = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        self.server.asked.append(self.headers["Range"])
        if script.isdecimal():
            self.send_error(int(script))
        elif script == "to a file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif script == "endless":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while not self.server.released.is_set():
                    self.wfile.write(bytes(1 << 18))
        elif script == "stalled":
            self.server.released.wait()
        else:
            if script == "late":
                time.sleep(0.2)
            start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if script != "no ranges" else 0
            if start >= len(BODY):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(BODY) - start))
            self.end_headers()
            self.wfile.write(BODY[start : int(0.9 * len(BODY)) if script in ("breaks off", "resets") else None])
            if script == "resets":  # the connection, in place of its orderly end
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                for end in (self.connection, self.rfile, self.wfile):
                    end.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(downloads, "_PAUSE", 0.001)
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.3)
    serving = Server()
    serving.released = threading.Event()
    thread = threading.Thread(target=serving.serve_forever, args=[0.05])
    thread.start()
    yield serving
    serving.released.set()
    serving.shutdown()
    thread.join()
    serving.server_close()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/a.txt"


def test_an_endless_answer_does_not_fill_the_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = ["endless"]
    free = iter([1 << 40] * 3 + [1 << 20] * 9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, free=next(free)))
    with pytest.raises(
        ResourceError, match=r"a\.txt: 786,432 bytes so far in .*\.part, and the disk is nearly full"
    ):
        download(address(server), SHA256)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://a b/c",
        "http://127.0.0.1:port/",
        "http://127.0.0.1/\u00e9",
        "http://" + "a" * 99 + ".com/",
        "http://127.0.0.1/a\nb",
    ],
)
def test_an_invalid_address_is_an_input_error(server: Server, url: str) -> None:
    with pytest.raises(InputError, match=r"not an address: .*collect\.sources") as caught:
        download(url, SHA256)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "asked"),
    [
        (["whole"], [None]),
        (["500", "429", "whole"], [None, None, None]),
        (["stalled", "whole"], [None, None]),
        (["breaks off", "whole"], [None, f"bytes={int(0.9 * len(BODY))}-"]),
        (["breaks off", "no ranges"], [None, f"bytes={int(0.9 * len(BODY))}-"]),
    ],
)
def test_a_download_is_retried_resumed_and_kept(
    server: Server, script: list[str], asked: list[str | None]
) -> None:
    server.script = script
    path = download(address(server), SHA256)
    assert path.read_bytes() == BODY
    assert server.asked == asked
    assert {file.name for file in path.parent.iterdir()} == {SHA256, f"{SHA256}.lock"}
    assert download("http://127.0.0.1:1/nobody", SHA256) == path  # from the cache


@pytest.mark.parametrize(
    ("script", "error", "words", "n_asked"),
    [
        ("404", InputError, "HTTP Error 404: Not Found; fix the address", 1),
        ("to a file", InputError, "not allowed", 1),
        ("503", ResourceError, "HTTP Error 503: Service Unavailable, in 5 tries; rerun", 5),
        ("stalled", ResourceError, "timed out, in 5 tries", 5),
    ],
)
def test_a_failed_download_has_the_right_error(
    server: Server, tmp_path: Path, script: str, error: type[Exception], words: str, n_asked: int
) -> None:
    server.script = [script]
    with pytest.raises(error, match=words):
        download(address(server), SHA256)
    assert len(server.asked) == n_asked
    assert not (tmp_path / ".gptpipe/downloads" / SHA256).exists()


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
@pytest.mark.parametrize(
    ("script", "sha256", "code", "words"),
    [
        ("404", SHA256, 3, "404"),
        ("500", SHA256, 5, "500"),
        ("stalled", SHA256, 5, "timed out"),
        ("resets", SHA256, 5, "reset by peer"),
        ("breaks off", SHA256, 5, "cut short"),
        ("to a file", SHA256, 3, "file:///etc/hostname"),
        ("whole", "0" * 64, 4, f"SHA-256 is {SHA256}"),
    ],
)
def test_a_corpus_with_a_bad_address_is_not_made(
    server: Server,
    tmp_path: Path,
    collect_params: MakeParams,
    script: str,
    sha256: str,
    code: int,
    words: str,
    alone: bool,
) -> None:
    server.script = [script]
    (tmp_path / "good.txt").write_text("\n".join(f"good {i}" for i in range(99)))
    good = {"kind": "text", "paths": (f"{tmp_path}/good.txt",), "document": "line"}
    bad = {"kind": "url", "url": address(server), "sha256": sha256, "document": "line"}
    with pytest.raises(GptpipeError) as caught:
        collect(collect_params(*([] if alone else [good]), bad), tmp_path / "raw")
    assert caught.value.exit_code == code
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "raw").exists()
    kept = {path.suffix for path in (tmp_path / ".gptpipe/downloads").iterdir()}
    assert kept <= {".part", ".lock"}  # nothing under the final name


def test_a_wrong_checksum_is_an_integrity_error_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=f"SHA-256 is {SHA256}, collect.sources names 0000"):
        download(address(server), "0" * 64)
    assert [path.name for path in (tmp_path / ".gptpipe/downloads").iterdir()] == [f"{'0' * 64}.lock"]


def test_two_runs_download_a_file_once(server: Server) -> None:
    """Both once wrote to one part file: the first reported a wrong checksum, the second a missing file."""
    server.script = ["late"]
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(download, [address(server)] * 2, [SHA256] * 2))
    assert [path.read_bytes() for path in paths] == [BODY] * 2
    assert server.asked == [None]


def test_a_kept_file_needs_no_lock_and_a_failed_lock_is_a_resource_error(
    server: Server, tmp_path: Path
) -> None:
    """The folder of downloads may be read-only."""
    folder = tmp_path / ".gptpipe/downloads"
    (folder / f"{SHA256}.lock").mkdir(parents=True)
    with pytest.raises(ResourceError, match=f"{SHA256}: cannot write: "):
        download(address(server), SHA256)
    (folder / SHA256).write_bytes(BODY)
    assert download(address(server), SHA256).read_bytes() == BODY
    assert server.asked == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_an_error_at_once_and_a_rerun_resumes(server: Server) -> None:
    program = """
import resource, sys
from gptpipe.collect.downloads import download
from gptpipe.shell.errors import ResourceError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    download(*sys.argv[1:])
except ResourceError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, address(server), SHA256], capture_output=True, text=True
    )
    assert f"{SHA256}.part: cannot write: File too large; free space" in done.stdout
    assert len(server.asked) == 1
    assert download(address(server), SHA256).read_bytes() == BODY
    assert server.asked[1] == "bytes=100000-"


def test_a_complete_part_is_accepted(server: Server, tmp_path: Path) -> None:
    part = tmp_path / ".gptpipe/downloads" / f"{SHA256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BODY)
    assert download(address(server), SHA256).read_bytes() == BODY


def test_a_url_source_is_downloaded_and_read(server: Server, collect_params: MakeParams) -> None:
    params = collect_params({"kind": "url", "url": address(server), "sha256": SHA256, "document": "line"})
    assert list(chain.from_iterable(read_source(params))) == BODY.decode().splitlines()
    assert find_files(params.sources).digests == {address(server): SHA256}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "stories"
    folder.mkdir()
    for part in range(2):
        lines = [json.dumps({"text": f"story {part} {i}", "body": {"a": None}}) for i in range(3)]
        (folder / f"train-{part}.jsonl").write_text("\n".join(lines))
    return {"kind": "huggingface", "dataset": str(folder), "revision": "a" * 40}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of datasets
def test_a_huggingface_source_is_read(
    tmp_path: Path, dataset: dict[str, Any], collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = collect_params(dataset)
    stories = [f"story {i} {j}" for i in range(2) for j in range(3)]
    assert list(chain.from_iterable(read_source(params))) == stories
    datasets: Any = importlib.import_module("datasets")
    asked, really = [], datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *rest, **how: asked.append(how) or really(*rest, **how)
    )
    name = DatasetName("a", dataset["dataset"], None, "train", "a" * 40)
    assert list(chain.from_iterable(dataset_rows(name, "text", 0, 1))) == stories
    assert asked == [{"split": "train", "revision": "a" * 40, "streaming": True}]
    assert list(find_files(params.sources).digests) == [f"huggingface://{tmp_path}/stories/default/train"]
    params = collect_params({**dataset, "text_column": "none"})
    with pytest.raises(InputError, match=r"no column `none` among text, body\.a"):
        list(read_source(params))


def test_a_dataset_needs_a_commit(collect_params: MakeParams) -> None:
    for revision in ({}, {"revision": "main"}):
        with pytest.raises(ValueError, match="revision"):
            collect_params({"kind": "huggingface", "dataset": "a/b", **revision})


def test_limits_and_weights(tmp_path: Path, collect_params: MakeParams) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"line {i:05d}" for i in range(10_000)))
    source = {"kind": "text", "paths": (f"{tmp_path}/a.txt",), "document": "line"}
    for limit, documents in (({"max_documents": 7}, 7), ({"max_bytes": 95}, 10)):  # ten bytes each
        counts = collect(collect_params({**source, **limit}, {**source, "document": "file"}), tmp_path / "raw")
        assert (counts["documents"], counts["documents_in"]) == (documents + 1, documents + 1)
    counts = collect(collect_params({**source, "weight": 0.25}), tmp_path / "quarter")
    assert counts["documents"] + counts["rejected_weighted_out"] == counts["documents_in"] == 10_000
    assert 2300 < counts["documents"] < 2700

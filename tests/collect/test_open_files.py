"""Compressed files, archives and remote addresses: the same texts as in the plain file; bounded resources."""

import bz2
import functools
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import tar, zip_
from reading import read_source

from gptpipe.collect import jsonl
from gptpipe.collect import open_files as opening
from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import find_files
from gptpipe.collect.texts import Rejected
from gptpipe.shell.errors import GptpipeError, InputError, ResourceError

MakeParams = Callable[..., CollectParams]
FIXTURES = Path(__file__).parents[1] / "fixtures/hostile"
LINES = [f"line {i} of some text" for i in range(5000)]
TEXT = "\n".join(LINES).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def parquet(texts: list[str]) -> bytes:
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue().to_pybytes()


@pytest.fixture
def texts(collect_params: MakeParams) -> Callable[..., list[str]]:
    """Read an address; a rejected text is returned as `-reason`."""

    def read_all(
        address: str, kind: str = "text", digests: dict[str, str] | None = None, **changed: Any
    ) -> list[str]:
        keys = {"document": "line"} if kind == "text" else {}
        params = collect_params({"kind": kind, "paths": (address,), **keys}, **changed)
        results = chain.from_iterable(read_source(params, digests))
        return [f"-{text.reason}" if isinstance(text, Rejected) else text for text in results]

    return read_all


@pytest.mark.parametrize("name", [*COMPRESS, "tar", "tar.gz", "tar.zst", "zip", "gz in tar", "zst in zip"])
def test_compressed_and_archived_text_equals_the_plain_text(tmp_path: Path, texts, name: str) -> None:
    half = TEXT.index(b"\n", len(TEXT) // 2)
    members = {"b.txt": TEXT[:half], "a/../../c.txt": TEXT[half + 1 :]}
    packed = {
        **{kind: compress(TEXT) for kind, compress in COMPRESS.items()},
        "tar": tar(members),
        "tar.gz": gzip.compress(tar(members)),
        "tar.zst": COMPRESS["zst"](tar(members)),
        "zip": zip_(members),
        "gz in tar": tar({name: gzip.compress(content) for name, content in members.items()}),
        "zst in zip": zip_({name: COMPRESS["zst"](content) for name, content in members.items()}),
    }
    (tmp_path / "file").write_bytes(packed[name])
    assert texts(str(tmp_path / "file")) == LINES
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_json_and_parquet_may_be_compressed(tmp_path: Path, texts) -> None:
    (tmp_path / "a").write_bytes(
        gzip.compress(b"\n".join(json.dumps({"text": line}).encode() for line in LINES))
    )
    assert texts(f"{tmp_path}/a", "jsonl") == LINES
    for content in (zip_({"x.parquet": parquet(LINES)}), gzip.compress(tar({"x.parquet": parquet(LINES)}))):
        (tmp_path / "b").write_bytes(content)
        assert texts(f"{tmp_path}/b", "parquet") == LINES


def test_two_compressed_frames_are_one_text(tmp_path: Path, texts) -> None:
    for compress in COMPRESS.values():
        (tmp_path / "file").write_bytes(compress(TEXT[:1000]) + compress(TEXT[1000:]))
        assert texts(str(tmp_path / "file")) == LINES


@pytest.mark.parametrize("name", [*COMPRESS, "tar.gz", "zip", "gz in zip"])
def test_a_truncated_file_is_an_input_error(tmp_path: Path, texts, name: str) -> None:
    whole = {
        **{kind: compress(TEXT) for kind, compress in COMPRESS.items()},
        "tar.gz": gzip.compress(tar({"a": TEXT})),
        "zip": zip_({"a": TEXT}),
        "gz in zip": zip_({"a": gzip.compress(TEXT)[:-500]}) + b"....",
    }[name]
    (tmp_path / "file").write_bytes(whole[:-4])
    with pytest.raises(InputError, match=r"file.*: (damaged, truncated or encrypted|cannot read): "):
        texts(str(tmp_path / "file"))


def test_a_flipped_bit_in_a_compressed_file_is_an_input_error(tmp_path: Path, texts) -> None:
    for kind in ("gz", "bz2", "xz"):  # zstd has a checksum only where its writer asked for one
        content = bytearray(COMPRESS[kind](TEXT))
        content[len(content) // 2] ^= 4
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InputError, match="file: "):
            texts(str(tmp_path / "file"))


@pytest.mark.parametrize("name", [*COMPRESS, "tar.gz", "zip", "gz in zip", "many in zip"])
def test_a_decompression_bomb_stops_at_max_expansion(
    tmp_path: Path, texts, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_FREE_BYTES", 4 << 20)
    zeros = b"a" * (8 << 20)
    content = {
        **{kind: compress(zeros) for kind, compress in COMPRESS.items()},
        "tar.gz": gzip.compress(tar({"a": zeros})),
        "zip": zip_({"a": zeros}),
        "gz in zip": zip_({"a": gzip.compress(zeros)}),
        "many in zip": zip_({str(i): zeros[: 1 << 20] for i in range(8)}),
    }[name]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(
        InputError, match=r"file: grows to more than 50 times its size; .*collect.max_expansion"
    ):
        texts(str(tmp_path / "file"), max_expansion=50)
    assert len(texts(str(tmp_path / "file"), max_expansion=1_000_000)) >= 8


def test_links_and_devices_in_an_archive_are_skipped(tmp_path: Path, texts) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for kind, target in (
            (tarfile.SYMTYPE, "/etc/passwd"),
            (tarfile.LNKTYPE, "../x"),
            (tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(f"member{ord(kind)}")
            info.type, info.linkname = kind, target
            archive.addfile(info)
    (tmp_path / "file.tar").write_bytes(file.getvalue())
    assert texts(f"{tmp_path}/file.tar") == []


def header(name: str, kind: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    """A header of a tar archive with its padded content; `size` replaces the true size."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def pax(record: bytes) -> bytes:
    return header("pax", tarfile.XHDTYPE, b"%d %b\n" % (len(record) + 4, record))


END = bytes(1024)
ONE = header("one", tarfile.REGTYPE, b"one")
WIDE_XZ = bytes.fromhex(
    "fd377a585a000004e6d6b44602002101250000003b787b4101000568656c6c6f0a000000a56097f1"
    "94f6fde000011e06c12fa41d1fb6f37d010000000004595a"
)
HOSTILE_ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "long pax header": (
        lambda: gzip.compress(header("pax", tarfile.XHDTYPE, bytes(60 << 20)) + ONE + END, 1),
        "file: a header of 62,914,560 bytes, above 1,048,576; pack the archive again",
    ),
    "long name": (
        lambda: gzip.compress(header("name", tarfile.GNUTYPE_LONGNAME, bytes(60 << 20)) + ONE + END, 1),
        "file: a header of 62,914,560 bytes",
    ),
    "negative header": (
        lambda: header("pax", tarfile.XHDTYPE, size=-512) + ONE + END,
        "file: a header of -512 bytes",
    ),
    "negative size": (lambda: header("a", tarfile.REGTYPE, size=-512) + ONE + END, "file: .*: a negative size"),
    "pax record of a wrong length": (
        lambda: header("pax", tarfile.XHDTYPE, b"99 path=a\n") + END,
        "a wrong length",
    ),
    "pax size that is none": (
        lambda: pax(b"size=many") + ONE + END,
        "file: damaged, truncated or encrypted: invalid",
    ),
    "sparse": (lambda: header("a", tarfile.GNUTYPE_SPARSE) + END, "file: a: a sparse file; .*without --sparse"),
    "sparse by pax": (lambda: pax(b"GNU.sparse.major=1") + ONE + END, "file: one: a sparse file; "),
    "damaged second header": (
        lambda: ONE + ONE.replace(b"one", b"two", 1) + END,
        "file: damaged, .*: bad checksum",
    ),
    "cut between members": (lambda: ONE, "file: damaged, .*: empty header"),
    "cut in a member": (
        lambda: header("a", tarfile.REGTYPE, b"one", size=2000),
        "file: a: damaged, .*ends too early",
    ),
    "zip without a name": (
        lambda: (FIXTURES / "nameless-member.zip").read_bytes(),
        "file: damaged, .*out of range",
    ),
    "zip with a name that is not UTF-8": (
        lambda: zip_({"d/\u00fc.txt": b"one"}).replace(b"\xc3\xbc", b"\xff\xff"),
        "file: damaged, .*can't decode byte",
    ),
    "zip with a large directory": (
        lambda: gzip.compress(
            zip_({"a": b""}) + bytes(30 << 20) + b"PK\5\6" + bytes(8) + b"\0\0\x90\1" + bytes(6), 1
        ),
        "file: a directory of 26,214,400 bytes, above 16,777,216; split the archive",
    ),
    "zip of lzma": (lambda: zip_({"a": b"one"}, zipfile.ZIP_LZMA), "file: a: packed with LZMA; .*deflate"),
    "xz that needs 1.5 GiB": (
        lambda: WIDE_XZ,
        "file: needs more than 160 MiB of memory to unpack; pack it again",
    ),
    "xz in zip that needs 1.5 GiB": (
        lambda: zip_({"a": WIDE_XZ}),
        "file: a: needs more than 160 MiB of memory",
    ),
    "garbage after gzip": (
        lambda: gzip.compress(b"one") + b"garbage",
        "file: damaged, truncated or encrypted: ",
    ),
    "damaged member": (lambda: zip_({"a": gzip.compress(TEXT)[:-9]}), "file: a: damaged, .*ends too early"),
}


@pytest.mark.parametrize("name", HOSTILE_ARCHIVES)
def test_a_hostile_archive_is_a_short_error_and_takes_little_memory(tmp_path: Path, texts, name: str) -> None:
    """A pax header of 700 MB in 7 MB once took 2.9 GB; tarfile stops silently at a damaged second header."""
    make, words = HOSTILE_ARCHIVES[name]
    (tmp_path / "file").write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=words) as caught:
            texts(str(tmp_path / "file"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/file: ")
    assert peak < 24 << 20


def test_a_long_chain_of_headers_needs_no_recursion(tmp_path: Path, texts) -> None:
    chain_of_headers = pax(b"comment=a") * 2000 + header("", tarfile.XGLTYPE, b"11 path=no\n") * 2000
    (tmp_path / "file").write_bytes(chain_of_headers + ONE + END)
    assert texts(str(tmp_path / "file")) == ["one"]


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_large_numbers_in_tar(tmp_path: Path, collect_params: MakeParams, format_: int) -> None:
    """Members have the names that tarfile gives them; any characters may occur in a name."""
    names = ["a/" * 100 + "b", "caf\u00e9", "caf\udce9", "new\nline", "c" * 3000]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.mtime = 5, 1 << 40, 1.5
            archive.addfile(info, io.BytesIO(b"\0text"))
    (tmp_path / "file").write_bytes(file.getvalue())
    params = collect_params({"kind": "text", "paths": (f"{tmp_path}/file",)})
    results = chain.from_iterable(read_source(params))
    assert [text.detail for text in results if isinstance(text, Rejected)] == [
        f"{tmp_path}/file: {name}: not text; convert or remove it" for name in names
    ]


def test_zeros_after_gzip_are_padding(tmp_path: Path, texts) -> None:
    (tmp_path / "file").write_bytes(gzip.compress(b"one\n") + bytes(700_000) + gzip.compress(b"two") + bytes(9))
    assert texts(str(tmp_path / "file")) == ["one", "two"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_decompressed_size(tmp_path: Path) -> None:
    """One line of 300 MB in a small file is read in pieces, under a limit of the address space."""
    with gzip.open(tmp_path / "line.gz", "wb", 1) as file:
        for _ in range(300):
            file.write(b"ab c" * (1 << 18))
    program = """
import resource, sys
from collections import Counter
from gptpipe.collect.params import CollectParams
from gptpipe.params import load_params
from reading import read_source
sources = ({"kind": "text", "paths": (sys.argv[1],)},)
changed = {"max_document_bytes": 1000, "max_expansion": 1000, "sources": sources}
params = CollectParams.model_validate({**dict(load_params().collect), **changed})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
print(sum(len(text) for texts in read_source(params) for text in texts))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "line.gz"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == 300 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves the folder tmp_path over real HTTP, without ranges."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    serving = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    )
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    thread.join()
    serving.server_close()


def test_http_files_are_read_and_their_digests_stored(
    tmp_path: Path, texts, server: str, collect_params: MakeParams
) -> None:
    packed = {
        "a.txt": TEXT,
        "b.txt.gz": gzip.compress(TEXT),
        "c.zip": zip_({"x": TEXT}),
        "d.tar": tar({"x": TEXT}),
    }
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
        digests: dict[str, str] = {}
        assert texts(f"{server}/{name}", digests=digests) == LINES
        assert digests == {f"{server}/{name}": hashlib.sha256(content).hexdigest()}
    (tmp_path / "e.parquet").write_bytes(parquet(LINES))
    assert texts(f"{server}/e.parquet", "parquet") == LINES
    with pytest.raises(InputError, match=r"/none\.txt: cannot read: 404, .*none\.txt'; fix"):
        texts(f"{server}/none.txt")
    params = collect_params({"kind": "text", "paths": (f"{server}/a.txt",)})
    assert find_files(params.sources).digests == {}


def test_an_unreachable_server_is_a_resource_error(texts, server: str) -> None:
    with pytest.raises(
        ResourceError, match=r"http://127.0.0.1:1/a: cannot read: Cannot connect to host .*; rerun"
    ):
        texts("http://127.0.0.1:1/a")


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"404 Not Found", InputError, "404"),
        (b"302 Found\r\nLocation: file:///etc/hostname", InputError, "file:///etc/hostname; fix"),
        (b"503 Service Unavailable", ResourceError, "503"),
        (b"200 OK\r\nContent-Length: 99", ResourceError, "not completed"),
    ],
    ids=["404", "to a file", "503", "short"],
)
def test_a_wrong_answer_of_a_server_has_the_right_error(
    texts, answer: bytes, error: type[GptpipeError], words: str
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.0 " + answer + b"\r\n\r\n" + (b"" if self.command == "HEAD" else b"some"))

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=[0.05])
        thread.start()
        try:
            with pytest.raises(error, match=rf"http://127.0.0.1:\d+/a: cannot read: .*{words}"):
                texts(f"http://127.0.0.1:{serving.server_port}/a")
        finally:
            serving.shutdown()
            thread.join()


def test_an_unknown_protocol_is_an_input_error(texts) -> None:
    with pytest.raises(
        GptpipeError, match=r"nonsense://a/b: Protocol not known: nonsense; for s3: .*'\.\[s3\]'"
    ):
        texts("nonsense://a/b")


@pytest.mark.filterwarnings("ignore")  # raised in a thread of moto or botocore, they leave the other waiting
def test_s3_files_are_read(tmp_path: Path, texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's server over HTTP: the package registries have no S3-compatible server."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    serving = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    serving.start()
    try:
        host, port = serving.get_host_and_port()
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ):
            monkeypatch.setenv(name, value)
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        system.mkdir("bucket")
        for name, content in (("b.txt", b"two"), ("a.txt.gz", gzip.compress(b"one")), ("c.md", b"three")):
            system.pipe(f"bucket/x/{name}", content)
        assert texts("s3://bucket/x/*.txt*") == ["one", "two"]
        with pytest.raises(InputError, match="s3://bucket/x/none: no file matches"):
            texts("s3://bucket/x/none")
        with pytest.raises(InputError, match=r"s3://bucket/y/\*: no file matches"):
            texts("s3://bucket/y/*")
    finally:
        serving.stop()


def test_gs_files_are_read(texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an emulator of Google's storage over HTTP."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    gcsfs = pytest.importorskip("gcsfs")
    serving = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    serving.start()
    try:
        host, port = serving._api._httpd.server_address
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        system = gcsfs.GCSFileSystem(skip_instance_cache=True)
        for name, content in (("b.txt", b"two"), ("a.txt.gz", gzip.compress(b"one")), ("c.md", b"three")):
            system.pipe(f"bucket/x/{name}", content)
        assert texts("gs://bucket/x/*.txt*") == ["one", "two"]
        with pytest.raises(InputError, match=r"gs://bucket/y/\*: no file matches"):
            texts("gs://bucket/y/*")
    finally:
        serving.stop()


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_an_address_of_a_local_file_is_its_path(tmp_path: Path, texts, scheme: str) -> None:
    """If it were a remote address, pipes and links to anywhere would be read."""
    (tmp_path / "a.txt").write_text("one")
    assert texts(f"{scheme}://{tmp_path}/a.txt") == ["one"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a regular file"):
        texts(f"{scheme}://{tmp_path}/pipe")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize(
    ("work", "path"),
    [
        ("with streams.seekable(streams.buffered('a', io.BytesIO(bytes(300_000)), len)): pass", "/tmp"),
        ("writer.add(pa.array(['some text'] * 1000)); writer.close()", "signatures.bin"),
    ],
)
def test_a_full_disk_is_a_resource_error(tmp_path: Path, work: str, path: str) -> None:
    program = f"""
import io, resource, tempfile
from pathlib import Path
import pyarrow as pa
from gptpipe.collect import streams
from gptpipe.collect.near_duplicates import SignatureWriter
from gptpipe.shell.errors import ResourceError
tempfile.tempdir = "/tmp"
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    writer = SignatureWriter(Path())
    {work}
except ResourceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(f"{path}: cannot write: File too large"), done.stderr


def test_a_line_of_json_that_is_too_long_is_rejected(
    tmp_path: Path, texts, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_LINE_BYTES", 100_000)
    line = json.dumps({"text": "x" * 116_000})
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{line}\n{{"text": "two"}}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: more than 116,000 bytes; split it"):
        texts(f"{tmp_path}/a.jsonl", "jsonl", max_document_bytes=1000)
    source = {"kind": "jsonl", "paths": (f"{tmp_path}/a.jsonl",), "on_bad": "skip"}
    one, bad, two = chain.from_iterable(read_source(collect_params(source, max_document_bytes=1000)))
    assert (one, bad.reason, two) == ("one", "line_too_long", "two")


def test_a_pipe_is_never_opened(tmp_path: Path, texts) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a regular file"):
        texts(f"{tmp_path}/pipe")

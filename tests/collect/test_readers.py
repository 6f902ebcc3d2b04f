"""Sources: which texts a file contains, and the error for a file that cannot be read."""

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read_source

from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import Part, find_files
from gptpipe.collect.paths import matching_files
from gptpipe.collect.readers import read_part
from gptpipe.collect.texts import Piece, Rejected
from gptpipe.shell.errors import InputError

MakeParams = Callable[..., CollectParams]
MIB = 1 << 20


@pytest.fixture
def texts(tmp_path: Path, collect_params: MakeParams) -> Callable[..., list[str]]:
    """Write and read one file; a rejected text is returned as `-reason`."""

    def read_one(kind: str, content: bytes, *, counts: Counter[str] | None = None, **keys: Any) -> list[str]:
        options = {name: keys.pop(name) for name in ("encoding_errors", "max_document_bytes") if name in keys}
        (tmp_path / "file").write_bytes(content)
        params = collect_params({"kind": kind, "paths": (str(tmp_path / "file"),), **keys}, **options)
        results = list(chain.from_iterable(read_source(params)))
        if counts is not None:
            counts["cut"] += sum(isinstance(text, Piece) for text in results)
        return [f"-{text.reason}" if isinstance(text, Rejected) else text for text in results]

    return read_one


def parquet_bytes(column: Any, name: str = "text") -> bytes:
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column}), file)
    return file.getvalue().to_pybytes()


def test_documents_are_files_lines_or_parts_between_separators(texts) -> None:
    content = b"one\ntwo\n---\nthree"
    assert texts("text", content) == ["one\ntwo\n---\nthree"]
    assert texts("text", content, document="line") == ["one", "two", "---", "three"]
    assert texts("text", content, document="separator", separator="\n---\n") == ["one\ntwo", "three"]
    assert texts("text", content + b"\n", document="line")[-1] == "three"
    assert texts("text", b"") == [""]  # one document, which cleaning rejects as empty
    assert texts("text", b"", document="line") == []


@pytest.mark.parametrize("separator", ["\n---\n", "\r\n---\r\n"])
def test_line_ends_and_byte_order_mark_make_no_difference(texts, separator: str) -> None:
    clean = b"one\ntwo\n---\n" + b"three " * 40
    twin = b"\xef\xbb\xbf" + clean.replace(b"\n", b"\r\n")
    for options in ({}, {"document": "line"}, {"document": "separator", "separator": separator}):
        assert texts("text", twin, max_document_bytes=64, **options) == texts(
            "text", clean, max_document_bytes=64, **options
        )
    assert texts("text", clean, document="separator", separator=separator)[0] == "one\ntwo"


def test_a_character_or_separator_across_chunks(texts) -> None:
    for before in range(MIB - 5, MIB + 2):
        content = b"a" * before + "€\r\n--\r\nü".encode() + b"b" * 10
        expected = ["a" * before + "€", "ü" + "b" * 10]
        assert (
            texts("text", content, max_document_bytes=4 * MIB, document="separator", separator="\n--\n")
            == expected
        )


def test_long_documents_are_cut_while_they_are_read_and_counted(texts) -> None:
    counts: Counter[str] = Counter()
    content = ("ü" * (3 * MIB) + "\nshort").encode()
    pieces = texts("text", content, document="line", max_document_bytes=1_000_000, counts=counts)
    assert "".join(pieces) == "ü" * (3 * MIB) + "short"
    assert [len(piece) for piece in pieces] == [500_000] * 6 + [145_728, 5]
    assert counts["cut"] == 6


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_long_documents_of_other_kinds_are_cut_and_counted(texts, kind: str) -> None:
    counts: Counter[str] = Counter()
    text = "a" * 150
    content = json.dumps({"text": text}).encode() if kind == "jsonl" else parquet_bytes([text])
    assert texts(kind, content, max_document_bytes=64, counts=counts) == ["a" * 64, "a" * 64, "a" * 22]
    assert counts["cut"] == 2


@pytest.mark.parametrize("offset", [0, 1, 1000, MIB - 2, MIB - 1, MIB, MIB + 1, 2 * MIB + 3])
def test_an_error_names_the_first_byte_that_is_not_utf8(texts, tmp_path: Path, offset: int) -> None:
    with pytest.raises(InputError, match=f"file: not UTF-8 at byte {offset};") as caught:
        texts("text", b"a" * offset + b"\xff" + b"b" * MIB + b"\xff")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(InputError, match=f"file: not UTF-8 at byte {offset};"):
        texts("text", b"a" * offset + "€".encode()[:2])  # cut off at the end of the file
    line_ends = b"\r\n" * (offset // 2) + b"a" * (offset % 2)
    with pytest.raises(InputError, match=f"file: not UTF-8 at byte {offset};"):
        texts("text", line_ends + b"\xff", document="line")


def test_the_offset_counts_the_byte_order_mark(texts) -> None:
    with pytest.raises(InputError, match="not UTF-8 at byte 6;"):
        texts("text", b"\xef\xbb\xbfabc\xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 14;"):
        texts("jsonl", b'\xef\xbb\xbf{"text":"ab\xff"}')


def test_the_offset_in_a_later_line_of_json(texts) -> None:
    with pytest.raises(InputError, match="not UTF-8 at byte 24;"):
        texts("jsonl", b'{"text": "good"}\n{"a": "\xff"}\n')


def test_a_character_across_chunks_before_the_bad_byte(texts) -> None:
    content = b"a" * (MIB - 1) + "€".encode() + b"\xff"
    with pytest.raises(InputError, match=f"not UTF-8 at byte {MIB + 2};"):
        texts("text", content)
    assert texts("text", content, encoding_errors="replace", max_document_bytes=4 * MIB)[0].endswith("a€\ufffd")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("text", b"caf\xe9"),
        ("jsonl", b'{"text": "caf\xe9"}'),
        (
            "parquet",
            parquet_bytes(
                pa.Array.from_buffers(
                    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")]
                )
            ),
        ),
    ],
)
def test_invalid_bytes_are_replaced_only_on_request(texts, kind: str, content: bytes) -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        texts(kind, content)
    assert texts(kind, content, encoding_errors="replace") == ["caf\ufffd"]


@pytest.mark.parametrize(
    "content",
    [
        b"text\0text",
        b"\x7fELF\x02\x01\x01\0",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"%PDF-1.7\n%text",
        b"a" * 8000 + b"\0",
        bytes(10_240),  # an empty tar archive; and a file that was never written
        b"".join(i.to_bytes(4, "little") for i in range(256)) * 3,
    ],
)
def test_binary_files_are_rejected(texts, content: bytes) -> None:
    assert texts("text", content) == ["-binary"]
    assert texts("text", content, encoding="cp1252") == ["-binary"]


def test_jsonl_texts_are_read_and_other_lines_rejected(texts) -> None:
    lines = (
        b'{"text": "one", "n": 1}\r',
        b"",
        b'{"n": 2}',
        b'{"text": null}',
        b"[1]",
        b'{"text": "lone \\ud800"}',
        b'{"text": ""}',
    )
    assert texts("jsonl", b"\xef\xbb\xbf" + b"\n".join(lines)) == [
        "one",
        "-no_text",
        "-no_text",
        "-no_text",
        "lone \ud800",
        "",
    ]
    assert texts("jsonl", b'{"body": "other"}', text_key="body") == ["other"]


@pytest.mark.parametrize("line", [b"{", b"text", b'{"text": "a"} more', b"[" * 100_000])
def test_an_error_names_the_line_that_is_not_json(texts, line: bytes) -> None:
    with pytest.raises(InputError, match="file, line 2: not JSON: "):
        texts("jsonl", b'{"text": "a"}\n' + line + b"\n")


def test_a_large_row_group_is_not_kept_in_memory(tmp_path: Path, collect_params: MakeParams) -> None:
    """The search for the longest entry of a dictionary once loaded the whole group."""
    column = [random.Random(i).randbytes(500).hex() for i in range(20_000)]
    (tmp_path / "file").write_bytes(parquet_bytes(column))
    params = collect_params({"kind": "parquet", "paths": (str(tmp_path / "file"),)})
    tracemalloc.start()
    try:
        assert sum(len(texts) for texts in read_source(params)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 < peak / MIB < 12 < (tmp_path / "file").stat().st_size / MIB


def test_a_long_text_is_cut_among_others(texts) -> None:
    counts = Counter[str]()
    column = ["one", None, "a" * 100 + "b", "two", "é" * 32, "é" * 33, "three"]
    assert texts("parquet", parquet_bytes(column), max_document_bytes=64, counts=counts) == [
        "one",
        "-no_text",
        "a" * 64,
        "a" * 36 + "b",
        "two",
        "é" * 32,
        "é" * 32,
        "é",
        "three",
    ]
    assert counts == {"cut": 2}


def test_parquet_columns_are_read_and_checked(texts) -> None:
    assert texts("parquet", parquet_bytes(["one", None, "ü"])) == ["one", "-no_text", "ü"]
    large = parquet_bytes(pa.array(["one"], pa.large_string()), "b")
    assert texts("parquet", large, text_column="b") == ["one"]
    with pytest.raises(InputError, match="no column `text` among body; set text_column"):
        texts("parquet", parquet_bytes(["one"], "body"))
    with pytest.raises(InputError, match="column `text` contains int64, not text"):
        texts("parquet", parquet_bytes([1]))
    with pytest.raises(InputError, match="file: not a readable Parquet file: "):
        texts("parquet", b"PAR1 and no more")
    with pytest.raises(InputError, match="file: not a readable Parquet file: "):
        texts("parquet", parquet_bytes(["one"])[:-20])


def test_an_extension_type_with_a_pickle_is_not_executed(texts, tmp_path: Path) -> None:
    payload = f"cos\nsystem\n(S'touch {tmp_path / 'canary'}'\ntR."
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    file = pa.BufferOutputStream()
    schema = pa.schema([pa.field("text", pa.string(), metadata=metadata)])
    pq.write_table(pa.Table.from_arrays([pa.array(["one"])], schema=schema), file)
    assert texts("parquet", file.getvalue().to_pybytes()) == ["one"]
    assert not (tmp_path / "canary").exists()


def test_matching_files_are_sorted_and_listed_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.md", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    paths = matching_files((f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt"))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a.txt", "b.txt", "sub/c.txt"]
    assert matching_files([f"{tmp_path}/s*/*"]) == [tmp_path / "sub" / "c.txt", tmp_path / "sub" / "d.md"]


def test_names_that_look_like_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file named `**` once hid all files that `**/*.txt` matches."""
    monkeypatch.chdir(tmp_path)
    for name in ("set [1]/a.txt", "set 1/b.txt", "**", "[", "c[1].txt", "c1.txt", "d**e.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("text")
    Path("link").symlink_to("set 1")
    for pattern, names in (
        ("set [1]/*.txt", ["set [1]/a.txt"]),
        ("**", ["**"]),
        ("s*/**/*.txt", ["set 1/b.txt", "set [1]/a.txt"]),
        ("[", ["["]),
        ("c[1].txt", ["c[1].txt"]),
        ("c*.txt", ["c1.txt", "c[1].txt"]),
        ("d**.txt", ["d**e.txt"]),
    ):
        assert matching_files([pattern]) == [*map(Path, names)]
    Path("link").unlink()
    assert Path("set 1/b.txt") in matching_files(["**/*.txt"])
    with pytest.raises(InputError, match="no file matches"):
        matching_files([256 * "x" + "*"])


def test_all_names_of_a_file_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute and a relative name, `..` and links to folders once counted twice."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/deep", "other/deep"):
        Path(folder).mkdir(parents=True)
        Path(folder, "a.txt").write_text("text")
    Path("data/b.txt").symlink_to("deep/a.txt")
    Path("link").symlink_to("data")
    Path("data/far").symlink_to("../other/deep")
    names = ["link/deep/../deep/*.txt", f"{tmp_path}/data/deep/a.txt", "./data//deep/a.txt"]
    assert matching_files([names[1]]) == [tmp_path / "data/deep/a.txt"]
    assert matching_files(names) == [Path("data/deep/a.txt")]
    # `..` of a link is the folder above its target.
    assert matching_files(["data/far/../deep/a.txt"]) == [tmp_path / "other/deep/a.txt"]
    # A link to a file counts like a copy.
    assert matching_files(["data/b.txt", "data/deep/a.txt"]) == [Path("data/b.txt"), Path("data/deep/a.txt")]


def test_a_named_file_is_read_under_each_of_its_names(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text('{"text": "one"}')
    params = collect_params({"kind": "jsonl", "paths": ("*", f"{tmp_path}/README.md")})
    assert find_files(params.sources)[1:] == ([["README.md"]], [[]])


def test_one_error_names_all_unreadable_files(tmp_path: Path, collect_params: MakeParams) -> None:
    (tmp_path / "good.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "folder").mkdir()
    params = collect_params(
        {"kind": "text", "paths": (f"{tmp_path}/*.txt", f"{tmp_path}/nothing*")},
        {"kind": "jsonl", "paths": (f"{tmp_path}/folder", "/dev/null")},
    )
    with pytest.raises(InputError) as caught:
        find_files(params.sources)
    message = str(caught.value)
    for part in (
        f"{tmp_path}/pipe.txt: not a regular file; ",
        f"{tmp_path}/loop.txt: Too many levels of symbolic links; ",
        f"{tmp_path}/nothing*: no file matches; ",
        f"{tmp_path}/folder: a folder, not a file; ",
        "/dev/null: not a regular file; ",
    ):
        assert part in message
    assert "good.txt" not in message
    assert "\n" not in message


def test_links_to_folders_are_an_error(tmp_path: Path) -> None:
    """With two links upwards, a recursive glob practically never ends."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("text")
    for name in ("one", "two", "three"):
        (tmp_path / "sub" / name).symlink_to("..")
    with pytest.raises(InputError) as caught:
        matching_files([f"{tmp_path}/**/*.txt"])
    for name in ("one", "two", "three"):
        assert f"{tmp_path}/sub/{name}: a link to a folder" in str(caught.value)
    assert matching_files([f"{tmp_path}/sub/*.txt"]) == [tmp_path / "sub" / "a.txt"]


def test_links_that_lead_out_are_an_error_and_others_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the folder where the glob starts and of the project; that folder may itself be a link."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    for name in ("elsewhere/a.txt", "project/cache/b.txt", "corpus/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("text")
    links = {"corpus/in.txt": "c.txt", "corpus/cached.txt": "../project/cache/b.txt", "linked": "elsewhere"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    followed = [*map(Path, ("corpus/c.txt", "corpus/cached.txt", "corpus/in.txt", "linked/a.txt"))]
    assert matching_files(["corpus/*.txt", "linked/*.txt"]) == followed
    (tmp_path / "corpus/out.txt").symlink_to("../elsewhere/a.txt")
    (tmp_path / "corpus/up").symlink_to("..")
    reported = []
    for pattern in ("corpus/*.txt", "corpus/out.txt", "corpus/*/elsewhere/*"):
        with pytest.raises(
            InputError, match=rf"a link that leads out of {tmp_path}/corpus .*elsewhere/a\.txt"
        ) as caught:
            matching_files([pattern])
        reported.append(str(caught.value).split(":")[0])
    assert reported == ["corpus/out.txt", "corpus/out.txt", "corpus/up/elsewhere/a.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="drops privileges")
def test_missing_permission_is_an_error(tmp_path: Path) -> None:
    """In another process without root's permissions, because root may read anything."""
    program = """
import os, sys
from gptpipe.collect.paths import matching_files
from gptpipe.shell.errors import InputError
if os.getuid() == 0:
    os.setuid(65534)
try:
    matching_files(sys.argv[1:])
except InputError as error:
    print(error)
"""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("text")
        (folder / name).chmod(0)
    (folder / "good.txt").write_text("text")
    (folder / "closed").mkdir(mode=0)
    folder.chmod(0o755)
    for pattern, expected in (
        ("*.txt", "a.txt: Permission denied; b.txt: Permission denied"),
        ("**/*.txt", "closed: Permission denied; a.txt: Permission denied; b.txt: Permission denied"),
        ("*/more/good.txt", "closed: Permission denied"),
        ("closed/*", "closed: Permission denied"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, pattern], cwd=folder, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(f"{expected}; fix collect.sources")


def test_fingerprints_are_file_digests_and_the_version_of_python(
    tmp_path: Path, collect_params: MakeParams
) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    params = collect_params({"kind": "python-docs"}, {"kind": "text", "paths": (f"{tmp_path}/*",)})
    assert find_files(params.sources).digests == {
        "python-docs": f"CPython {sys.version.split()[0]}",
        f"{tmp_path}/a.txt": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1",
    }


def test_a_file_name_that_is_not_utf8_has_a_printable_fingerprint(
    tmp_path: Path, collect_params: MakeParams
) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"text")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    params = collect_params({"kind": "text", "paths": (f"{tmp_path}/*",)})
    names = [name.encode() for name in find_files(params.sources).digests]
    assert names == [f"{tmp_path}/caf\\xe9.txt".encode()]


def test_docstrings_and_code_of_an_installed_package(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read, never imported. Its tests, and a file that declares a wrong encoding, are skipped."""
    canary = tmp_path / "imported"
    files = {
        "__init__.py": f'"""All of it."""\nopen({str(canary)!r}, "w")\n',
        "b.py": "# -*- coding: latin-1 -*-\ndef f():\n    '''Says \xe4.'''\n",
        "a/deep.py": "class C:\n    '''A class.'''\n",
        "broken.py": "# -*- coding: no-such -*-\n",
        "tests/test_b.py": "'''Not of the library.'''\n",
    }
    for name, content in files.items():
        (path := tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    params = collect_params(
        {"kind": "python-docs", "package": "pack"}, {"kind": "python-code", "package": "pack"}
    )
    docs, code = (
        list(chain.from_iterable(read_part(Part(i, ""), source, params, {})))
        for i, source in enumerate(params.sources)
    )
    assert docs == ["All of it.", "A class.", "Says \xe4."]
    assert code == [files["__init__.py"], files["a/deep.py"], files["b.py"]]
    assert not canary.exists()
    before = find_files(params.sources).digests
    assert sorted(before) == ["python-code pack", "python-docs pack"]
    (tmp_path / "pack/a/deep.py").write_text("x = 1\n")
    assert find_files(params.sources).digests.items().isdisjoint(before.items())
    missing = collect_params({"kind": "python-code", "package": "nowhere"})
    with pytest.raises(InputError, match="Python package nowhere is not installed"):
        find_files(missing.sources)


def test_code_of_the_standard_library(collect_params: MakeParams) -> None:
    params = collect_params({"kind": "python-code"})
    code = list(chain.from_iterable(read_source(params)))
    assert any(
        'def parse(source, filename="<unknown>", mode="exec"' in str(text).replace("'", '"') for text in code
    )
    assert sum(map(len, map(str, code))) > 5_000_000

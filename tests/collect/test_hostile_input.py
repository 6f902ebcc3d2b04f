"""Hostile inputs through the whole stage collect: each alone, and after 99 good documents."""

import bz2
import gzip
import hashlib
import lzma
import os
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import find_candidates_with

from gptpipe.base.manifest import verify
from gptpipe.collect import collect as collecting
from gptpipe.collect import jsonl, open_files
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.shell.errors import InputError

FIXTURES = Path(__file__).parents[1] / "fixtures/hostile"
GOOD = [f"good document number {i}" for i in range(99)]
WORDS = " ".join(f"word{i}" for i in range(100))
LONG = b"ab " * 1_000_000
NUMBERS = b" ".join(b"%d" % (i * i) for i in range(20_000))

# What the file holds; which counts it leaves when it is the only one, or the words of the error.
TABLE: dict[str, tuple[bytes, dict[str, int] | str]] = {
    "invalid utf-8": (b"fine until \xff here", "hostile: not UTF-8 at byte 11; "),
    "cut off utf-8": ("ends in a €".encode()[:-1], "hostile: not UTF-8 at byte 10; "),
    "utf-16": ("some text".encode("utf-16"), {"documents": 1, "bytes": 9}),
    "utf-16 the other way round": (b"\xfe\xff\0a\0b", {"documents": 1, "bytes": 2}),
    "utf-16 without a mark": ("some text".encode("utf-16-le"), "hostile: not UTF-8 at byte 0; it is UTF-16-LE"),
    "nul": (b"some\0text", {"rejected_binary": 1}),
    "elf": (b"\x7fELF\x02\x01\x01\0\0", {"rejected_binary": 1}),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", {"rejected_binary": 1}),
    "pdf": (b"%PDF-1.7\n%text", {"rejected_binary": 1}),
    "empty": (b"", {"rejected_empty": 1}),
    "white": (b" \r\n\t\n", {"rejected_empty": 1}),
    "byte order mark and crlf": (b"\xef\xbb\xbfone\r\ntwo", {"documents": 1, "bytes": 7}),
    "special token": (b"a <|endoftext|> b", {"documents": 1, "bytes": 17}),
    "one long line": (LONG, {"documents": 3, "cut": 2}),
    "gz bomb": (gzip.compress(b"a" * (4 << 20)), "hostile: grows to more than 200 times its size; "),
    "zst bomb": (pa.compress(b"a" * (4 << 20), "zstd", asbytes=True), "hostile: grows to more than 200 times"),
    "truncated gz": (gzip.compress(NUMBERS)[:-9], "hostile: damaged, truncated or encrypted: "),
    "truncated bz2": (bz2.compress(NUMBERS)[:-9], "hostile: damaged, truncated or encrypted: "),
    "truncated xz": (lzma.compress(NUMBERS)[:-9], "hostile: damaged, truncated or encrypted: "),
    "truncated zst": (pa.compress(NUMBERS, "zstd", asbytes=True)[:-9], "hostile: cannot read: Truncated"),
    "a zip that is none": (b"PK\x03\x04\x14\0 and no more", "hostile: damaged, truncated or encrypted: "),
}


@pytest.fixture
def collected(tmp_path: Path, collect_params: Callable[..., CollectParams]) -> Callable[..., dict[str, int]]:
    """Collect the file `hostile`, alone or after 99 good lines."""

    def run(alone: bool, kind: str = "text", **keys: Any) -> dict[str, int]:
        (tmp_path / "good.txt").write_text("\n".join(GOOD))
        good = {"kind": "text", "paths": (f"{tmp_path}/good.txt",), "document": "line"}
        hostile = {"kind": kind, "paths": (f"{tmp_path}/hostile",)}
        return collect(collect_params(*([] if alone else [good]), hostile, **keys), tmp_path / "raw")

    return run


def in_workers(monkeypatch: pytest.MonkeyPatch, constants: dict[str, int]) -> None:
    """Change constants in the worker processes of stage collect, which read Parquet files."""
    monkeypatch.setattr(collecting, "find_candidates", partial(find_candidates_with, constants=constants))


def check(run: Callable[[], dict[str, int]], outcome: dict[str, int] | str, alone: bool, raw: Path) -> None:
    expected = {} if isinstance(outcome, str) else outcome
    if isinstance(outcome, str) or (alone and not expected.get("documents")):
        reasons = "".join(expected)[9:]
        left = (
            f"no document left of 1 (1 {reasons})"
            if reasons
            else "no document left of 0: the sources are empty"
        )
        words = outcome if isinstance(outcome, str) else left
        with pytest.raises(InputError) as caught:
            run()
        assert caught.value.exit_code == 3
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not raw.exists()
        return
    base = {} if alone else {"documents": 99, "bytes": sum(map(len, GOOD))}
    counts = run()
    for name, n in expected.items():
        assert counts[name] == n + base.get(name, 0), name
    rejected = sum(n for name, n in counts.items() if name.startswith("rejected_"))
    assert counts["documents_in"] == counts["documents"] + rejected
    assert verify(raw).counts == counts
    texts = [
        text for shard in sorted(raw.glob("*.parquet")) for text in pq.read_table(shard)["text"].to_pylist()
    ]
    assert len(texts) == counts["documents"]
    assert alone or texts[:99] == GOOD


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
@pytest.mark.parametrize("name", TABLE)
def test_a_hostile_text_file(
    collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, alone: bool
) -> None:
    monkeypatch.setattr(open_files, "_FREE_BYTES", 1 << 20)
    content, outcome = TABLE[name]
    (tmp_path / "hostile").write_bytes(content)
    check(lambda: collected(alone), outcome, alone, tmp_path / "raw")


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        (b'{"text": "lone \\ud800"}', {"rejected_lone_surrogates": 1}),
        (b'{"text": 7}', {"rejected_no_text": 1}),
        (b'{"text": "' + b"x" * (2 << 20) + b'"}', "hostile, line 1: more than 1,048,576 bytes; split it"),
        (b'{"text": ', "hostile, line 1: not JSON: "),
        (b'{"text": "caf\xe9"}', "hostile: not UTF-8 at byte 13; "),
        (b"\x7fELF\x02\x01\x01\0\0", "hostile, line 1: not JSON: "),
        (b'{"text": "a\\u0000b"}', {"documents": 1, "bytes": 2}),
        (b"", {}),
    ],
    ids=["lone surrogate", "no text", "2 MB", "not json", "invalid utf-8", "elf", "nul", "empty"],
)
def test_a_hostile_line_of_json(
    collected,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: bytes,
    outcome: dict[str, int] | str,
    alone: bool,
) -> None:
    # 16 times `max_document_bytes` is added.
    monkeypatch.setattr(jsonl, "_LINE_BYTES", (1 << 20) - 16 * 1_000_000)
    (tmp_path / "hostile").write_bytes(line)
    check(lambda: collected(alone, "jsonl"), outcome, alone, tmp_path / "raw")


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
@pytest.mark.parametrize("kind", ["loop", "fifo", "folder", "dangling link", "link out"])
def test_a_path_that_is_no_regular_file_is_an_error_and_nothing_hangs(
    collected, tmp_path: Path, kind: str, alone: bool
) -> None:
    path = tmp_path / "hostile"
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link out":
        path.symlink_to("/etc/passwd")
    else:
        path.symlink_to("nothing")
    check(lambda: collected(alone), f"{tmp_path}/hostile: ", alone, tmp_path / "raw")


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
def test_equal_and_nearly_equal_documents(collected, tmp_path: Path, alone: bool) -> None:
    records = pa.table({"text": [WORDS, WORDS, WORDS.replace("word50", "other"), WORDS.upper()]})
    pq.write_table(records, tmp_path / "hostile")
    outcome = {"documents": 1, "rejected_duplicate": 1, "rejected_near_duplicate": 2}
    check(lambda: collected(alone, "parquet", dedup="near"), outcome, alone, tmp_path / "raw")


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
def test_byte_order_mark_and_line_ends_do_not_change_the_id(collected, tmp_path: Path, alone: bool) -> None:
    (tmp_path / "hostile").write_bytes(TABLE["byte order mark and crlf"][0])
    collected(alone)
    table = pq.read_table(tmp_path / "raw/docs-00000.parquet")
    assert table["id"].to_pylist()[-1] == hashlib.sha256(b"one\ntwo").hexdigest()


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
def test_documents_with_replaced_bytes_are_counted(collected, tmp_path: Path, alone: bool) -> None:
    (tmp_path / "hostile").write_bytes(TABLE["invalid utf-8"][0])
    counts = collected(alone, encoding_errors="replace")
    assert counts["with_replacement_character"] == 1
    texts = pq.read_table(tmp_path / "raw/docs-00000.parquet")["text"].to_pylist()
    assert texts == [*([] if alone else GOOD), "fine until \ufffd here"]


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")]
)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
@pytest.mark.parametrize(
    ("texts", "options", "outcome"),
    [
        (["a" * 100] * 20_000, {}, "hostile: grows to more than 200 times its size; "),
        (
            ["a" * (1 << 20) + str(i) for i in range(4)],
            {"use_dictionary": False, "compression": "zstd"},
            "hostile: grows to more than 200 times its size; ",
        ),
        (NOT_UTF8, {}, "hostile, column `text`, row 1: not UTF-8 at byte 3; "),
        (pa.array([None], pa.string()), {}, {"rejected_no_text": 1}),
        (pa.array([], pa.string()), {}, {}),
    ],
    ids=["dictionary bomb", "zstd bomb", "invalid utf-8", "no text", "empty"],
)
def test_a_hostile_parquet_file(
    collected,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: Any,
    options: Any,
    outcome: Any,
    alone: bool,
) -> None:
    in_workers(monkeypatch, {"open_files._FREE_BYTES": 1 << 20})
    pq.write_table(pa.table({"text": texts}), tmp_path / "hostile", **options)
    check(lambda: collected(alone, "parquet"), outcome, alone, tmp_path / "raw")


def test_a_parquet_file_with_a_column_name_that_is_not_utf8(collected, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["fine"], "other": ["fine"]}), tmp_path / "hostile")
    content = (tmp_path / "hostile").read_bytes()
    (tmp_path / "hostile").write_bytes(content.replace(b"other", b"oth\xffr"))
    with pytest.raises(InputError, match=r"hostile: the name of a column is not UTF-8; "):
        collected(True, "parquet")


@pytest.mark.slow
def test_a_parquet_file_whose_rows_share_one_long_text_is_read_in_small_batches(
    tmp_path: Path, collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 KB of file contain 200 MB of text; with max_expansion raised, one document, under a memory limit."""
    in_workers(monkeypatch, {"readers._MEMORY": 160 << 20})
    pq.write_table(pa.table({"text": ["a" * 200_000] * 1000}), tmp_path / "hostile")
    counts = collected(True, "parquet", max_expansion=1_000_000)
    assert (counts["documents"], counts["rejected_duplicate"]) == (1, 999)


def test_a_parquet_file_that_needs_too_much_memory(
    tmp_path: Path, collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_workers(monkeypatch, {"readers._MEMORY": 80 << 20})
    pq.write_table(pa.table({"text": ["a" * (60 << 20)]}), tmp_path / "hostile", compression="zstd")
    with pytest.raises(InputError, match=r"hostile: needs more than \d+ MiB of memory to read: it is damaged"):
        collected(True, "parquet", max_expansion=1_000_000)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_parquet_file_that_crashes_its_reader(
    collected, tmp_path: Path, capfd: pytest.CaptureFixture[str], packed: Callable[[bytes], bytes], alone: bool
) -> None:
    """An uncaught C++ exception once ended the process with SIGABRT."""
    (tmp_path / "hostile").write_bytes(packed((FIXTURES / "native-crash.parquet").read_bytes()))
    check(lambda: collected(alone, "parquet"), "hostile: its reader crashed (SIGABRT)", alone, tmp_path / "raw")
    assert "terminate called" not in capfd.readouterr().err


def test_file_names_cannot_break_a_message_or_the_report(
    tmp_path: Path, collect_params: Callable[..., CollectParams]
) -> None:
    """Names in rejections, too: a name that is not UTF-8 once could not be written next to a shard."""
    (tmp_path / "good.txt").write_text("good")
    folder = tmp_path / "new\nline"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"\x1b[31m<b>caf\xe9")).write_bytes(b"\0binary")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    params = collect_params(
        *({"kind": "text", "paths": (f"{path}",)} for path in (f"{tmp_path}/*.txt", f"{folder}/*"))
    )
    collect(params, tmp_path / "raw", tmp_path / "report.md")
    assert rf"{tmp_path}/new\nline/\x1b[31m<b>caf\xe9" in unescape((tmp_path / "report.md").read_text())
    assert not {"<", "\x1b"} & set((tmp_path / "report.md").read_text())
    params = collect_params({"kind": "parquet", "paths": (f"{folder}/*",)})
    with pytest.raises(InputError) as caught:
        collect(params, tmp_path / "raw")
    assert str(caught.value).startswith(
        rf"{tmp_path}/new\nline/\x1b[31m<b>caf\xe9: not a readable Parquet file: "
    )
    assert "\n" not in str(caught.value)

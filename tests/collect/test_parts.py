"""Parts of sources: together they give each text once and in order, whatever their size."""

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read_source

from gptpipe.collect import parts
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import find_files, plan_parts
from gptpipe.collect.texts import Piece, Rejected

MakeParams = Callable[..., CollectParams]
SIZES = (5, 8, 13, 21, 34, 89, 233)  # bytes
TEXTS = [
    "one",
    "",
    "zwölf\tBoote",
    "日本語",
    "a" * 40,
    "  two ",
    "one",
    "x",
    *(f"text {i}" for i in range(20)),
    "end",
]


@pytest.fixture
def read_at(tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Read the file for each size of parts; yields the number of parts and the texts, without line numbers."""

    def read(
        name: str, content: bytes, *, sizes: tuple[int, ...] = SIZES, **keys: Any
    ) -> Iterator[tuple[int, list[str]]]:
        (tmp_path / name).write_bytes(content)
        kind = {"jsonl": "jsonl", "parquet": "parquet"}.get(name.split(".")[1], "text")
        changed = {"max_document_bytes": keys.pop("max_document_bytes", 1_000_000)}
        params = collect_params({"kind": kind, "paths": (f"{tmp_path}/{name}",), **keys}, **changed)
        for size in (1 << 25, *sizes):
            monkeypatch.setattr(parts, "PART_BYTES", size)
            n_parts = len(plan_parts(params, find_files(params.sources)))
            yield n_parts, list(map(described, chain.from_iterable(read_source(params))))

    return read


def described(text: str | Rejected) -> str:
    if isinstance(text, Rejected):
        return f"-{text.reason}"
    return f"+{text}" if isinstance(text, Piece) else text


def check(results: Iterator[tuple[int, list[str]]], expected: list[str] | None = None) -> list[str]:
    """All sizes give the texts of one part; returns these."""
    n_parts, texts = next(results)
    assert n_parts == 1
    assert expected is None or texts == expected
    numbers = []
    for n, others in results:
        assert others == texts, n
        numbers.append(n)
    assert max(numbers) > 10
    return texts


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("at_end", [True, False])
def test_parts_of_text_files_contain_each_document_once(read_at, line_end: str, at_end: bool) -> None:
    lines = [text.strip() for text in TEXTS]
    content = (line_end.join(lines) + line_end * at_end).encode()
    check(read_at("a.txt", content, document="line"), lines)
    check(read_at("b.txt", b"\xef\xbb\xbf" + content, document="line"), lines)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\n---\n", "||", "<|end|>"])
def test_parts_between_separators_contain_each_document_once(read_at, separator: str, line_end: str) -> None:
    texts = ["one\ntwo", *filter(None, TEXTS)]  # no separators that touch: `||||` may be divided in two ways
    content = separator.join(texts).replace("\n", line_end).encode()
    check(read_at("a.txt", content, document="separator", separator=separator), texts)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_parts_between_blank_lines_contain_each_document_once(read_at, line_end: str) -> None:
    """Three line ends in a row may be divided in two ways. Cleaning removes the line end that is left over."""
    texts = ["one\ntwo", "\nthree", "", "four\n", "\n\n", *TEXTS]
    content = "\n\n".join(texts).replace("\n", line_end).encode()
    for n_parts, found in read_at("a.txt", content, document="separator", separator="\n\n"):
        kept = [text.strip("\n") for text in found if text.strip("\n")]
        assert kept == [text.strip("\n") for text in texts if text.strip("\n")], n_parts


def test_a_document_that_is_a_file_is_cut_in_the_same_way(read_at) -> None:
    """A file is divided only where it is cut anyway; no text is lost; each part but the first continues it."""
    content = "\n".join(f"line {i}" for i in range(200)).encode()
    for n_parts, texts in read_at("a.txt", content, max_document_bytes=64):
        assert "".join(text.removeprefix("+") for text in texts) == content.decode(), n_parts
        assert [text.startswith("+") for text in texts] == [False] + [True] * (len(texts) - 1)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_parts_of_jsonl_contain_each_line_once(read_at, line_end: str) -> None:
    lines = [json.dumps({"text": text, "n": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    lines[5:5] = ["", '{"text": null}', "  "]
    texts = check(read_at("a.jsonl", line_end.join(lines).encode()))
    assert texts == [*TEXTS[:5], "-no_text", *TEXTS[5:]]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_parts_of_a_parquet_file_contain_each_row_once(read_at, rows: int) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), file, row_group_size=rows)
    check(read_at("a.parquet", file.getvalue(), sizes=(50, 170, 900)), TEXTS)


def test_parts_of_a_zip_archive_contain_each_member_once(read_at) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i, text in enumerate(TEXTS):
            archive.writestr(f"{i}.txt", text)
    check(read_at("a.zip", file.getvalue(), sizes=(50, 170, 900)), TEXTS)


def test_compressed_and_wide_files_are_not_divided(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 10)
    (tmp_path / "a.txt").write_bytes("a line\n".encode("utf-16") * 20)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(bytes(range(256)) * 20))
    for keys in ({"paths": (f"{tmp_path}/*",)}, {"paths": (f"{tmp_path}/a.txt",), "encoding": "cp1252"}):
        params = collect_params({"kind": "text", "document": "line", **keys})
        planned = plan_parts(params, find_files(params.sources))
        assert [(part.start, part.end) for part in planned] == [(0, None)] * len(planned)


def test_small_files_are_read_in_groups_and_the_same_file_has_one_name(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`./a` and `a` are one file; two equal sources have parts of different names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "PART_BYTES", 25)
    for i in range(10):
        Path(f"{i}.txt").write_text("ten bytes.")
    source = {"kind": "text", "paths": ("./*.txt", "0.txt", "././1.txt")}
    params = collect_params(source, source)
    planned = plan_parts(params, find_files(params.sources))
    by_source = groupby(planned, key=lambda part: part.source)
    assert [[len(part.addresses) for part in some] for _, some in by_source] == [[2] * 5] * 2
    assert [address for part in planned[:5] for address in part.addresses] == [f"{i}.txt" for i in range(10)]
    assert len({part.name for part in planned}) == len(planned)
    assert collect(params, tmp_path / "raw")["documents_in"] == 20


def test_the_names_of_parts_depend_on_what_their_candidates_depend_on(
    tmp_path: Path, collect_params: MakeParams
) -> None:
    (tmp_path / "a.txt").write_text("text")
    source = {"kind": "text", "paths": (f"{tmp_path}/a.txt",)}

    def name(**changed: Any) -> str:
        keys = {key: changed.pop(key) for key in ("min_document_bytes", "filters") if key in changed}
        params = collect_params({**source, **changed}, **keys)
        (part,) = plan_parts(params, find_files(params.sources))
        return part.name

    names = [
        name(),
        name(weight=0.5),
        name(on_bad="skip"),
        name(keep_trailing_spaces=True),
        name(document="line"),
    ]
    names += [name(min_document_bytes=2), name(filters={"sentences": 2})]
    assert len(set(names)) == len(names)
    assert name(paths=(f"{tmp_path}/*.txt",)) == names[0]
    (tmp_path / "a.txt").write_text("Text")
    assert name() not in names

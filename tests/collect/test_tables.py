"""Columns of Parquet files: types, names, parts of a file, long texts; errors of datasets and encodings."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptpipe.collect import tables
from gptpipe.collect.cleaning import cut
from gptpipe.collect.encodings import not_utf8
from gptpipe.collect.tables import DatasetName, dataset_rows, parquet_rows
from gptpipe.collect.texts import Piece, Rejected
from gptpipe.shell.errors import InputError


def parquet(columns: Any, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **options)
    return file


def rows(file: io.BytesIO, column: str = "text", max_bytes: int | None = None, **part: Any) -> list[str]:
    """The texts of a file; the detail of a Rejected."""
    lists: Iterable[Any] = parquet_rows("file", file, column, "strict", 1 << 40, 200, max_bytes, **part)
    return [text.detail if isinstance(text, Rejected) else text for texts in lists for text in texts]


@pytest.mark.parametrize(
    "type_",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.json_(),
    ],
    ids=str,
)
def test_a_column_of_any_type_that_holds_text_is_read(type_: pa.DataType) -> None:
    texts = pa.array(["one", None, "zwölf" * 10, "", "one"])
    column = (
        texts.cast(pa.string()).cast(type_)
        if type_ != pa.json_()
        else pa.ExtensionArray.from_storage(type_, texts)
    )
    assert rows(parquet({"n": [1] * 5, "text": column})) == ["one", "file, row 2", "zwölf" * 10, "", "one"]


@pytest.mark.parametrize("type_", [pa.null(), pa.float64(), pa.list_(pa.string())], ids=str)
def test_a_column_without_any_value_is_rejected_row_by_row(type_: pa.DataType) -> None:
    """pandas gives such a column another type than in the files next to it."""
    assert rows(parquet({"text": pa.nulls(2, type_)})) == ["file, row 1", "file, row 2"]
    with pytest.raises(InputError, match="file: column `text` contains double, not text; set text_column"):
        rows(parquet({"text": [None, 1.5]}))
    with pytest.raises(InputError, match="file: column `text` contains list<element: string>, not text"):
        rows(parquet({"text": [None, ["one"]]}))


def test_a_field_of_a_struct_is_read() -> None:
    values = [{"b": "one", "n": 1}, None, {"b": None, "n": 2}, {"b": "two", "n": 3}]
    file = parquet({"n": [1] * 4, "a": pa.array(values)})
    assert rows(file, "a.b") == ["one", "file, row 2", "file, row 3", "two"]
    assert rows(parquet({"a": pa.array([{"b": {"c": "deep"}}])}), "a.b.c") == ["deep"]
    assert rows(parquet({"a": pa.array([{"b": "nested"}]), "a.b": ["flat"]}), "a.b") == ["flat"]
    assert rows(parquet({"a.b": pa.array([{"c": "one"}])}), "a.b.c") == ["one"]
    assert rows(parquet({"a": pa.array([{"b.c": "two", "b": {"d": "three"}}])}), "a.b.c") == ["two"]
    with pytest.raises(InputError, match=r"file: column `a` contains list<.*>, not structs; set text_column"):
        rows(parquet({"a": pa.array([[{"b": "one"}]])}), "a.b")
    for column, words in (
        ("a", "file: column `a` is a struct; set text_column of the source to one of a.b, a.n"),
        ("a.c", "file: no column `a.c` among n, a.b, a.n; set text_column of the source"),
        ("n.b", "file: no column `n.b` among n, a.b, a.n; "),
    ):
        with pytest.raises(InputError, match=words):
            rows(file, column)


def test_two_columns_with_the_same_name() -> None:
    same = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "text", "other"])
    with pytest.raises(InputError, match="file: 2 columns `text`; rename all but one"):
        rows(parquet(same))
    assert rows(parquet(same), "other") == ["c"]
    struct = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(InputError, match=r"file: 2 fields `meta\.text`; rename all but one"):
        rows(parquet({"meta": struct}), "meta.text")


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False, "compression": "none"}], ids=["dictionary", "plain"]
)
def test_parts_that_divide_a_file_contain_each_row_once(options: dict[str, Any]) -> None:
    texts = [f"text {i}" if i % 5 else None for i in range(400)]
    file = parquet({"n": range(400), "text": texts}, row_group_size=30, **options)
    size = len(file.getvalue())
    expected = rows(file)
    assert expected[5] == "file, row 6"
    groups = pq.ParquetFile(file).metadata
    first = groups.row_group(1).column(0)
    start_of_second = first.dictionary_page_offset if options == {} else first.data_page_offset
    for ends in ([], [start_of_second], *([size * i // n for i in range(1, n)] for n in (2, 7, 30))):
        parts = [rows(file, start=start, end=end) for start, end in zip([0, *ends], [*ends, None], strict=True)]
        assert [text for part in parts for text in part] == expected
    assert rows(file, end=start_of_second) == expected[:30]
    assert rows(file, start=start_of_second) == expected[30:]


def test_a_long_text_is_cut_while_it_is_decoded() -> None:
    long = "ü line\n" * 5000 + "€" * 777
    file = parquet({"text": ["one", long, None, "two", "x" * 1000, "x" * 1001]})
    lists = list(parquet_rows("file", file, "text", "strict", 1 << 40, 200, 1000))
    pieces = [text for texts in lists for text in texts if isinstance(text, Piece)]
    expected = ["one", *cut(long, 1000), "file, row 3", "two", "x" * 1000, "x" * 1000, "x"]
    assert rows(file, max_bytes=1000) == expected
    assert len(pieces) == len(cut(long, 1000)) - 1 + 1
    assert sum(len(text) for text in lists[1]) <= 1000  # a chunk at a time


def test_a_bad_cell_names_the_byte_and_the_rows_after_it_are_read() -> None:
    content = "é".encode() * 2000 + b"\xff"
    long = rows(parquet({"text": pa.array([b"one", content, b"two"])}), max_bytes=333)
    problem = "file, column `text`, row 2: not UTF-8 at byte 4000; convert the column, or set collect.encoding"
    assert [text for text in long if "é" not in text] == ["one", f"{problem}_errors to replace", "two"]
    assert rows(parquet({"text": pa.array([b"\xff", b"two"])}))[1:] == ["two"]


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("max_bytes", [None, 20])
def test_bytes_of_a_cell_that_is_no_text_are_not_replaced(errors: str, max_bytes: int | None) -> None:
    cells = ["some text".encode("utf-16"), bytes([255, *range(1, 60)])]
    file = parquet({"text": pa.array(cells)})
    utf16, binary = (
        text for texts in parquet_rows("file", file, "text", errors, 9**9, 200, max_bytes) for text in texts
    )
    assert isinstance(utf16, Rejected)
    assert utf16.detail == "file, column `text`, row 1: not UTF-8 at byte 0; it is UTF-16: convert the column"
    assert isinstance(binary, Rejected)
    assert binary.detail.endswith("it looks compressed or binary: convert the column, or name another")


def test_a_large_dictionary_page_is_not_read_to_find_its_longest_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 200 MB was once in memory five times. Such a page is read row by row instead."""
    monkeypatch.setattr(tables, "_DICTIONARY_BYTES", 10_000)
    read, really = [], tables._longest_in_dictionary
    monkeypatch.setattr(tables, "_longest_in_dictionary", lambda *args: read.append(args) or really(*args))
    for length, n_rows in ((100, 1024), (20_000, 52)):  # 1 MiB / 20,004 bytes of the page
        file = parquet({"text": ["x" * length] * 2000})
        groups = [pq.ParquetFile(file).metadata.row_group(0)]
        assert tables._rows_per_batch(file, "text", groups) == n_rows
        assert rows(file) == ["x" * length] * 2000
    assert len(read) == 2  # twice the short one


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("some text".encode("utf-16"), "it is UTF-16: set encoding: utf-16 of the source, or convert it"),
        (
            b"\xfe\xff" + "текст".encode("utf-16-be"),
            "it is UTF-16: set encoding: utf-16 of the source, or convert it",
        ),
        (
            "café au lait".encode("utf-16-le"),
            "it is UTF-16-LE: set encoding: utf-16-le of the source, or convert it",
        ),
        (
            "café au lait".encode("utf-16-be"),
            "it is UTF-16-BE: set encoding: utf-16-be of the source, or convert it",
        ),
        ("some text".encode("utf-32"), "it is UTF-32: set encoding: utf-32 of the source, or convert it"),
        (
            "café au lait".encode("utf-32-be"),
            "it is UTF-32-BE: set encoding: utf-32-be of the source, or convert it",
        ),
        (bytes(range(1, 256)), "it looks compressed or binary: unpack, convert or remove it"),
        (
            "café au lait\r\n\t".encode("latin-1"),
            "set encoding of the source (such as cp1252), convert",
        ),
        ("кодировка".encode("koi8-r"), "set encoding of the source (such as cp1252 or koi8-r), or convert the"),
        ("世界人权".encode("gb18030"), "set encoding of the source (such as cp1252 or koi8-r), or convert the"),
    ],
)
def test_the_advice_for_bytes_that_are_not_utf8(content: bytes, words: str) -> None:
    """Replacing most bytes of a text would turn it into garbage that passes as text."""
    message = str(not_utf8("file", 7, content))
    assert message.startswith(f"file: not UTF-8 at byte 7; {words}")
    assert ("encoding_errors" in message) == ("(such as cp1252)," in message)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "one", "n": 1}))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of datasets
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"split": "validation"},
            r"huggingface://x: Bad split: validation. Available splits: \['train'\]; fix",
        ),
        (
            {"name": "other"},
            "huggingface://x: BuilderConfig 'other' not found. Available: .*; fix dataset, name",
        ),
        ({"dataset": "/nothing/here"}, "huggingface://x: .*/nothing/here.*; fix dataset"),
    ],
)
def test_a_wrong_key_of_a_dataset_is_an_input_error(folder: Path, keys: dict[str, str], words: str) -> None:
    """datasets raises ValueError, which once was reported as a lost connection."""
    name = DatasetName("huggingface://x", str(folder), None, "train", "a" * 40)._replace(**keys)
    with pytest.raises(InputError, match=words):
        list(dataset_rows(name, "text", 0, 1))


@pytest.mark.parametrize("state", ["state.json", "dataset_dict.json"])
def test_a_folder_of_save_to_disk_is_an_input_error(folder: Path, state: str) -> None:
    (folder / state).write_text("{}")
    with pytest.raises(InputError, match=r"a folder of save_to_disk, .*; write the dataset with to_parquet"):
        list(dataset_rows(DatasetName("huggingface://x", str(folder), None, "train", "a" * 40), "text", 0, 1))

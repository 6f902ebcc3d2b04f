"""Archives: which members are read, which are skipped and counted, and archives in archives."""

import gzip
import json
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import tar, zip_
from reading import read_source

from gptpipe.collect import open_files as opening
from gptpipe.collect.archives import is_tar
from gptpipe.collect.file_kinds import Format, document_kind, is_other_file
from gptpipe.collect.open_files import open_files
from gptpipe.collect.texts import Rejected
from gptpipe.shell.errors import InputError

MIB = 1 << 20


@pytest.fixture
def opened(tmp_path: Path):
    """Open a file with this content: for each name after the file's own, its content, or `-reason`.

    Raises InputError if a member cannot be opened, as a source without `on_bad: skip` does.
    """

    def open_all(
        content: bytes, format_: Format = "text", max_expansion: int = 200, **options
    ) -> dict[str, str]:
        path = tmp_path / "file"
        path.write_bytes(content)
        results = {}
        for name, file in open_files(str(path), max_expansion, {}, format_=format_, **options):
            assert name.startswith(str(path))
            if isinstance(file, Rejected):
                assert file.detail.startswith(name)
                if file.reason == "unreadable":
                    raise InputError(file.detail)
            key = name.removeprefix(f"{path}").removeprefix(": ")
            assert key not in results
            results[key] = f"-{file.reason}" if isinstance(file, Rejected) else file.read().decode()
        return results

    return open_all


@pytest.mark.parametrize("pack", [tar, zip_])
def test_files_of_systems_and_of_other_formats_are_skipped_and_counted(opened, pack) -> None:
    names = [
        "__MACOSX/._a.jsonl",
        "._a.jsonl",
        "d/.DS_Store",
        "Thumbs.db",
        "README.md",
        "LICENSE",
        "x.png",
        "b.csv.gz",
    ]
    members = dict.fromkeys(names, b"\x00\xff") | {
        "d/a.jsonl": b"one",
        "part-0": b"two",
        "b.jsonl.gz": b"three",
    }
    expected = dict.fromkeys(names, "-other_file") | {
        "d/a.jsonl": "one",
        "part-0": "two",
        "b.jsonl.gz": "three",
    }
    assert opened(pack(members), "jsonl") == expected


def test_which_names_belong_to_another_format() -> None:
    never: tuple[str, ...] = (
        ".DS_Store",
        "a/__MACOSX/b",
        "~$a.docx",
        "desktop.ini",
        "x.jpg",
        "x.parquet.zip/.git/a",
    )
    formats: dict[Format, tuple[str, str]] = {  # what is accepted, what is not
        "text": (
            "a.txt README LICENSE.md a.csv a.py a.pdf a.2020 noend a.unknown a.txt.xz a.zip",
            "a.parquet a.MP3",
        ),
        "jsonl": (
            "a.jsonl a.JSON a.ndjson.zst noend a.unknown RC_2020-01 a.tar.gz",
            "a.txt readme SHA256SUMS a.pdf",
        ),
        "parquet": (
            "a.parquet a.pq noend part-0.c000 a.tgz",
            "a.jsonl Readme.MD LICENCE _SUCCESS _metadata _common_metadata a.crc a.json.gz",
        ),
    }
    for format_, (accepted, others) in formats.items():
        assert [name for name in accepted.split() if is_other_file(name, format_)] == []
        assert [name for name in [*others.split(), *never] if not is_other_file(name, format_)] == []


def test_a_pattern_chooses_members_whatever_their_format(opened) -> None:
    members = {"train/a.txt": b"one", "./train/b/c.txt": b"two", "test/a.txt": b"three", "train/._a.txt": b"\0"}
    results = opened(tar(members), "jsonl", members="train/*.txt")
    assert results == {
        "train/a.txt": "one",
        "./train/b/c.txt": "two",
        "test/a.txt": "-other_file",
        "train/._a.txt": "-other_file",
    }
    members = {"train/a.txt": b"one", "train\\b\\c.txt": b"two", "test/a.txt": b"three"}
    for pattern in ("train/**/*.txt", "./train/*"):
        assert [text for text in opened(zip_(members), members=pattern).values() if text[0] != "-"] == [
            "one",
            "two",
        ]


@pytest.mark.parametrize("outer", [tar, zip_])
@pytest.mark.parametrize("inner", [tar, zip_, lambda members: gzip.compress(tar(members))])
def test_an_archive_in_an_archive_is_read(opened, outer, inner) -> None:
    content = outer({"in": inner({"a.txt": b"one", "x.png": b"", "b.txt": b"two"}), "c.txt": b"three"})
    expected = {"in: a.txt": "one", "in: x.png": "-other_file", "in: b.txt": "two", "c.txt": "three"}
    assert opened(content) == expected
    assert opened(content, members="b.*") == {**expected, "in: a.txt": "-other_file", "c.txt": "-other_file"}


def test_an_archive_that_is_too_deep_is_skipped_and_counted(opened) -> None:
    deep = zip_({"in": tar({"deeper": zip_({"a.txt": b"one"}), "b.txt": b"two"})})
    assert opened(deep) == {"in: deeper": "-nested_archive", "in: b.txt": "two"}


@pytest.mark.parametrize("depth", ["gz in zip in zip", "zip in tar.gz", "many zips"])
def test_a_bomb_in_an_archive_in_an_archive_stops_at_max_expansion(opened, depth: str, monkeypatch) -> None:
    """The limit counts what all levels expand to together."""
    monkeypatch.setattr(opening, "_FREE_BYTES", MIB)
    zeros = bytes(3 * MIB)
    content = {
        "gz in zip in zip": zip_(
            {"in": zip_({"a": gzip.compress(zeros)}, zipfile.ZIP_STORED)}, zipfile.ZIP_STORED
        ),
        "zip in tar.gz": gzip.compress(tar({"in": zip_({"a": zeros})})),
        "many zips": zip_({f"in{i}": zip_({"a": zeros[: MIB // 2]}) for i in range(6)}),
    }[depth]
    with pytest.raises(
        InputError, match=r"file: grows to more than 20 times its size; .*collect.max_expansion"
    ):
        opened(content, max_expansion=20)
    assert sum(map(len, opened(content, max_expansion=100_000).values())) == 3 * MIB


def test_tar_in_tar_does_not_count_as_expansion(opened, monkeypatch) -> None:
    monkeypatch.setattr(opening, "_FREE_BYTES", 0)
    assert opened(tar({"in": tar({"a": b"a" * MIB})}), max_expansion=1) == {"in: a": "a" * MIB}


OFFICE = {
    "a Word document": zip_({"[Content_Types].xml": b"<Types/>", "word/document.xml": b"<w/>"}),
    "an Excel document": zip_({"xl/workbook.xml": b"<x/>", "[Content_Types].xml": b"<Types/>"}),
    "a PowerPoint document": zip_({"[Content_Types].xml": b"", "ppt/presentation.xml": b""}),
    "an EPUB book": zip_({"mimetype": b"application/epub+zip", "a.xhtml": b"<html/>"}, zipfile.ZIP_STORED),
    "an OpenDocument file": zip_({"mimetype": b"application/vnd.oasis.opendocument.text"}, zipfile.ZIP_STORED),
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "an RTF document": rb"{\rtf1\ansi text}",
    "an iWork document": zip_({"preview.jpg": b"\xff\xd8", "Index/Document.iwa": b"\0"}),
    "an old Office document": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000),
}


@pytest.mark.parametrize("kind", OFFICE)
def test_office_documents_are_binary(tmp_path: Path, opened, kind: str) -> None:
    """The XML in a Word document was once read as text."""
    assert opened(OFFICE[kind]) == {"": "-binary"}
    assert opened(tar({"a": OFFICE[kind], "b": b"text"})) == {"a": "-binary", "b": "text"}
    path = tmp_path / "document"
    path.write_bytes(OFFICE[kind])
    ((_, file),) = open_files(str(path), 200, {})
    assert isinstance(file, Rejected)
    assert file.detail == f"{path}: {kind}, not plain text; convert it"


def test_ordinary_files_that_look_like_documents_are_read(opened) -> None:
    assert opened(zip_({"mimetype": b"a word", "b": b"text"})) == {"mimetype": "a word", "b": "text"}
    for text in ("%PDF-1.4 is a version", "%PDF-1.4\nis a version", "%PDF is not a magic number"):
        assert opened(text.encode()) == {"": text}


def test_the_kind_of_a_document_takes_time_in_proportion_to_its_length() -> None:
    """A file of line feeds after a PDF's magic number once took hours, found by fuzzing."""
    assert document_kind(b"%PDF-1.4" + b"\n" * 1_000_000) is None


@pytest.mark.parametrize(
    "start",
    ["BZh91AY&SY", "PK\x03\x04", "PK\x05\x06", "P*M\x18", "\x1f\x1e", "Rar!\x1a\x07", "LZIP\x01", "\x02!L\x18"],
)
def test_a_text_that_starts_with_a_magic_number_is_text(opened, start: str) -> None:
    text = f"{start} is how some files start. " * 20
    assert opened(text.encode()) == {"": text}
    assert opened(tar({"a": text.encode()})) == {"a": text}


@pytest.mark.parametrize(
    ("place", "value", "words"), [(8, 9, "packed with Deflate64; pack"), (6, 1, "encrypted; unpack it")]
)
def test_a_zip_archive_that_cannot_be_unpacked_says_why(opened, place: int, value: int, words: str) -> None:
    archive = bytearray(zip_({"a": b"text"}))
    archive[place] = value  # method or flags in the header of the member, and in the directory
    archive[archive.index(b"PK\x01\x02") + place + 2] = value
    with pytest.raises(InputError, match=f"a: {words}"):
        opened(bytes(archive))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
        (b"Rar!\x1a\x07\x01\0", "a RAR archive"),
        (b"\x1f\x9d\x90text", r"compressed by compress \(.Z\)"),
        (b"\x02\x21\x4c\x18\x10\0\0\0", "compressed by an old version of LZ4"),
        (b"\xff\x06\0\0sNaPpYabc", "compressed by Snappy"),
        (b"LZIP\x01\x0c\0\xff", "compressed by lzip"),
    ],
)
def test_a_format_that_cannot_be_unpacked_is_named(opened, content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=f"file: {words}, which cannot be read; unpack it"):
        opened(content)
    with pytest.raises(InputError, match=f"file: in: {words}, which cannot be read; unpack it"):
        opened(zip_({"in": content}))
    assert opened(tar({"in": content}), members="other") == {"in": "-other_file"}


def test_brotli_has_no_magic_number_but_a_name(opened) -> None:
    with pytest.raises(InputError, match=r"a\.br: compressed by Brotli, which cannot be read"):
        opened(tar({"a.br": b"\x8b\x03\x80\xff\xfetext"}))
    assert opened(tar({"site.com.br": "não é Brotli".encode()})) == {"site.com.br": "não é Brotli"}


def test_old_tar_archives_are_read_and_texts_are_not(opened) -> None:
    """A text with `ustar` at byte 257 was once reported as a damaged archive."""
    old = tarfile.TarInfo("a.txt")
    old.size = 3
    block = bytearray(old.tobuf(tarfile.USTAR_FORMAT))
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert opened(bytes(block) + b"one" + bytes(509 + 1024)) == {"a.txt": "one"}
    text = "x" * 257 + "ustar  is a magic number" + "y" * 500
    assert opened(text.encode()) == {"": text}
    assert not is_tar(bytes(512))
    assert opened(zip_({})) == {}


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_in_other_encodings(opened, format_: int) -> None:
    latin = os.fsdecode("café.jsonl".encode("latin-1"))
    assert opened(tar({latin: b"one"}, format_), "jsonl") == {latin: "one"}
    content = zip_({"cafX.jsonl": b"one", "ü.jsonl": b"two"}).replace(b"cafX", b"caf\x82")  # cp437
    assert opened(content, "jsonl") == {"café.jsonl": "one", "ü.jsonl": "two"}


def test_ranges_that_divide_a_zip_archive_contain_each_member_once(opened) -> None:
    members = {f"{i}.txt": random.Random(i).randbytes(i * 10).hex().encode() for i in range(50)}
    content = zip_(members, zipfile.ZIP_STORED)
    for n_ranges in (1, 2, 7, 300):
        ends = [len(content) * i // n_ranges for i in range(1, n_ranges)]
        found = [
            opened(content, start=start, end=end) for start, end in zip([0, *ends], [*ends, None], strict=True)
        ]
        assert [item for part in found for item in part.items()] == [
            (name, text.decode()) for name, text in members.items()
        ]
    for end in (1, 35):  # a header of 30 bytes and a name of 5
        assert opened(content, start=0, end=end) == {"0.txt": ""}
    assert opened(OFFICE["an EPUB book"], start=0, end=1) == {"": "-binary"}
    for other in (OFFICE["an EPUB book"], tar({"a": b"one"}), b"text", gzip.compress(b"text")):
        assert opened(other, start=1) == {}


def test_skipped_members_reach_the_counts(tmp_path: Path, collect_params) -> None:
    (tmp_path / "a.zip").write_bytes(
        zip_({"a.jsonl": json.dumps({"text": "one"}).encode(), "README": b"about"})
    )
    params = collect_params({"kind": "jsonl", "paths": (f"{tmp_path}/a.zip",)})
    texts = [text for texts in read_source(params) for text in texts]
    assert texts == ["one", Rejected("other_file", f"{tmp_path}/a.zip: README")]


def test_a_nested_parquet_file_is_read(opened, tmp_path: Path, collect_params) -> None:
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["one"]}), file)
    (tmp_path / "a.tar").write_bytes(tar({"in.zip": zip_({"a.parquet": file.getvalue().to_pybytes()})}))
    params = collect_params({"kind": "parquet", "paths": (f"{tmp_path}/a.tar",)})
    assert [text for texts in read_source(params) for text in texts] == ["one"]

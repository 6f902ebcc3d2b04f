"""Bad records: which stop the stage, which are skipped, and what messages and warnings say."""

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import tar, zip_

from gptpipe.collect import parts
from gptpipe.collect.collect import collect
from gptpipe.collect.messages import warn_about_files
from gptpipe.collect.params import CollectParams
from gptpipe.formats.corpus import shard_paths
from gptpipe.shell.errors import InputError

MakeParams = Callable[..., CollectParams]
FIXTURES = Path(__file__).parents[1] / "fixtures/hostile"


def write(path: Path, content: bytes, kind: str = "jsonl", **keys: Any) -> dict[str, Any]:
    """Write a file; returns the source that reads it."""
    path.write_bytes(content)
    return {"kind": kind, "paths": (str(path),), **keys}


def texts_of(folder: Path) -> list[str]:
    return [text for shard in shard_paths(folder) for text in pq.read_table(shard)["text"].to_pylist()]


def json_lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


@pytest.mark.parametrize(
    ("kind", "content", "keys", "reason"),
    [
        ("jsonl", b'{"text": "one"}\n{"text": \n{"text": "two"}\n', {}, "not_json"),
        ("jsonl", b'{"text": "one"}\n{"text": "\xff"}\n{"text": "two"}\n', {}, "not_utf8"),
        ("text", b"one\ncaf\xe9\ntwo\n", {"document": "line"}, "not_utf8"),
        ("text", b"one\n--\ncaf\xe9\n--\ntwo", {"document": "separator", "separator": "\n--\n"}, "not_utf8"),
    ],
    ids=["jsonl", "jsonl utf-8", "lines", "separator"],
)
def test_on_bad_skip_counts_bad_records_up_to_max_bad(
    tmp_path: Path, collect_params: MakeParams, kind: str, content: bytes, keys: dict[str, Any], reason: str
) -> None:
    source = write(tmp_path / "a", content, kind, **keys)
    with pytest.raises(InputError, match=rf"^{tmp_path}/a"):
        collect(collect_params(source), tmp_path / "raw")
    skipping = source | {"on_bad": "skip", "max_bad": 0.34}
    counts = collect(collect_params(skipping), tmp_path / "raw", tmp_path / "report.md")
    assert (counts["documents_in"], counts["documents"], counts[f"rejected_{reason}"]) == (3, 2, 1)
    assert texts_of(tmp_path / "raw") == ["one", "two"]
    assert reason.replace("_", " ") in (tmp_path / "report.md").read_text()
    words = (
        rf"{kind}: 1 of 3 records \(33\.3%\) are bad, above max_bad 0\.33; "
        r"fix the files, or raise max_bad; the fir"
    )
    with pytest.raises(InputError, match=words):
        collect(collect_params(skipping | {"max_bad": 0.33}), tmp_path / "raw")


def test_on_bad_skip_leaves_out_a_damaged_parquet_file(tmp_path: Path, collect_params: MakeParams) -> None:
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    source = {"kind": "parquet", "paths": (f"{tmp_path}/*.parquet",)}
    with pytest.raises(InputError, match=r"b\.parquet: not a readable Parquet file"):
        collect(collect_params(source), tmp_path / "raw")
    counts = collect(collect_params(source | {"on_bad": "skip", "max_bad": 0.5}), tmp_path / "raw")
    assert (counts["documents"], counts["rejected_unreadable"]) == (2, 1)


def test_a_damaged_member_does_not_lose_the_rest_of_its_archive(
    tmp_path: Path, collect_params: MakeParams
) -> None:
    """Packed and damaged text, a damaged archive, an unknown compression, and another encoding."""
    damaged = gzip.compress(bytes(range(256)) * 99)[:-9]
    inner = tar({"a.gz": damaged, "b.txt": b"two"})
    members = {
        "1.txt": b"one",
        "2.txt.gz": damaged,
        "3.zip": zip_({"a.txt": b"lost"})[:-9],
        "4.7z": b"7z\xbc\xaf\x27\x1c\xff",
        "5.tar": inner,
        "6.txt": b"three",
    }
    for pack in (tar, zip_):
        source = write(tmp_path / "a", pack(members), "text", on_bad="skip", max_bad=0.9)
        counts = collect(collect_params(source), tmp_path / "raw")
        assert (counts["documents"], counts["rejected_unreadable"]) == (3, 4)
        assert texts_of(tmp_path / "raw") == ["one", "two", "three"]
        with pytest.raises(InputError, match=r"a: 2\.txt\.gz: damaged, truncated") as caught:
            collect(collect_params(source | {"on_bad": "stop"}), tmp_path / "raw")
        assert "3.zip" not in str(caught.value)
    packed = zip_({"1.txt": b"one", "2.txt": b"two"}, zipfile.ZIP_LZMA)
    lzma_first = write(tmp_path / "b", packed, "text", on_bad="skip", max_bad=1.0)
    with pytest.raises(InputError, match=r"2 unreadable.*packed with LZMA"):
        collect(collect_params(lzma_first), tmp_path / "raw")


def test_one_error_names_the_bad_records_of_all_sources(tmp_path: Path, collect_params: MakeParams) -> None:
    """The first of each file; no more than 20, with the number of the others."""
    sources = [
        write(tmp_path / "good.txt", b"good", "text"),
        write(tmp_path / "a.jsonl", b"{bad\n{worse\n"),
        write(tmp_path / "b.txt", b"caf\xe9", "text"),
    ]
    with pytest.raises(InputError) as caught:
        collect(collect_params(*sources), tmp_path / "raw")
    message = str(caught.value)
    assert f"{tmp_path}/a.jsonl, line 1: not JSON" in message
    assert f"; {tmp_path}/b.txt: not UTF-8 at byte 3; " in message
    assert "line 2" not in message
    assert "\n" not in message
    for i in range(25):
        write(tmp_path / f"c{i:02d}.jsonl", b"{bad\n")
    with pytest.raises(InputError, match=r"c00\.jsonl, .*c19\.jsonl, .*; and 5 more$"):
        collect(collect_params({"kind": "jsonl", "paths": (f"{tmp_path}/c*.jsonl",)}), tmp_path / "raw")


@pytest.mark.parametrize("alone", [True, False])
def test_a_reader_that_crashes_is_an_error_that_names_the_file(
    tmp_path: Path, collect_params: MakeParams, alone: bool
) -> None:
    """Among other files the name is right too, because each Parquet file is a part."""
    hostile = (FIXTURES / "native-crash.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(hostile)
    for name in () if alone else ("a", "c"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=rf"^{tmp_path}/b\.parquet: its reader crashed \(SIG\w+\)") as caught:
        collect(collect_params({"kind": "parquet", "paths": (f"{tmp_path}/*.parquet",)}), tmp_path / "raw")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ("naïve café œuvre 5 €\n".encode("cp1252"), {"encoding": "cp1252"}),
        ("naïve café œuvre 5 €\n".encode("utf-16"), {}),
        ("naïve café œuvre 5 €\n".encode("utf-32"), {}),
        ("naïve café œuvre 5 €\n".encode("utf-16-le"), {"encoding": "utf-16-le"}),
        ("naïve café œuvre 5 €\n".encode("utf-16"), {"encoding": "cp1252"}),  # the mark has precedence
        ("naïve café œuvre 5 €\n".encode(), {}),
        ("naïve café œuvre 5 €\n".encode("utf-8-sig"), {"encoding": "cp1252"}),
    ],
)
@pytest.mark.parametrize("document", ["line", "file"])
def test_encodings(
    tmp_path: Path, collect_params: MakeParams, content: bytes, keys: dict[str, Any], document: str
) -> None:
    collect(collect_params(write(tmp_path / "a", content, "text", document=document, **keys)), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["naïve café œuvre 5 €"]


def test_jsonl_in_another_encoding(tmp_path: Path, collect_params: MakeParams) -> None:
    content = '{"text": "café"}\n'.encode("utf-16")
    collect(collect_params(write(tmp_path / "a", content)), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["café"]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_utf16_without_a_mark_is_a_bad_record(
    tmp_path: Path, collect_params: MakeParams, kind: str, errors: str
) -> None:
    """It was once skipped as `binary`, next to files that are read."""
    write(tmp_path / "a", json_lines({"text": "a readable text"}))
    content = json_lines({"text": "some text"}).decode() * 2
    write(tmp_path / "b", content.encode("utf-16-le"))
    source = {"kind": kind, "paths": (f"{tmp_path}/*",)}
    words = r"b: not UTF-8 at byte 0; it is UTF-16-LE: set encoding: utf-16-le of the source, or convert"
    with pytest.raises(InputError, match=words):
        collect(collect_params(source, encoding_errors=errors), tmp_path / "raw")


def test_encoding_utf16_refuses_a_file_in_utf8(tmp_path: Path, collect_params: MakeParams) -> None:
    """Pairs of its bytes are valid UTF-16: Chinese without meaning."""
    source = write(tmp_path / "a", b"An even number of bytes.", "text", encoding="UTF-16")
    with pytest.raises(InputError, match=r"a: UTF-8, but encoding of the source is utf-16; give"):
        collect(collect_params(source), tmp_path / "raw")


@pytest.mark.parametrize(
    ("encoding", "bad"),
    [("shift_jis", b"\x81\xff"), ("utf-16-le", b"\x00\xd8a\0"), ("cp1252", b"\x81"), ("utf-8", b"\xe9t")],
)
def test_on_bad_skip_loses_one_document_in_any_encoding(
    tmp_path: Path, collect_params: MakeParams, encoding: str, bad: bytes
) -> None:
    """In other encodings than UTF-8, the rest of the file was once lost and counted as one bad record."""
    lines = [f"line {i}\n".encode(encoding) for i in range(40)]
    lines[7] = bad + lines[7]
    keys = {"encoding": encoding, "on_bad": "skip", "document": "line"}
    counts = collect(collect_params(write(tmp_path / "a", b"".join(lines), "text", **keys)), tmp_path / "raw")
    assert (counts["documents"], counts["rejected_not_utf8"]) == (39, 1)


def test_a_wrong_key_lists_the_keys_and_a_nested_key_is_found(
    tmp_path: Path, collect_params: MakeParams
) -> None:
    source = write(
        tmp_path / "a", json_lines({"body": "one", "meta": {"lang": "en"}}, {"body": "two", "id": 1})
    )
    with pytest.raises(
        InputError, match=r"a: no line has the key `text`; the keys are body, meta.lang, id; set text_key"
    ):
        collect(collect_params(source), tmp_path / "raw")
    collect(collect_params(source | {"text_key": "meta.lang"}), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["en"]
    dotted = write(tmp_path / "b", json_lines({"a.b": "flat", "a": {"b": "nested"}}), text_key="a.b")
    collect(collect_params(dotted), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["flat"]


@pytest.mark.parametrize(
    "content",
    [b'[{"text": "one"}]', b'[\n{"text": "one"},\n{"text": "two"}\n]\n', b"[1, 2]\n", b"\n \n[\n{}]"],
)
def test_a_json_array_is_recognised(tmp_path: Path, collect_params: MakeParams, content: bytes) -> None:
    with pytest.raises(InputError, match=r"a: a JSON array, not one JSON object per line; convert it, .*jq -c"):
        collect(collect_params(write(tmp_path / "a", content)), tmp_path / "raw")


def test_an_object_over_several_lines_is_recognised(tmp_path: Path, collect_params: MakeParams) -> None:
    content = json.dumps({"text": "one"}, indent=2).encode()
    with pytest.raises(InputError, match=r"a: a JSON object over several lines, not one .*`jq -c \.`$"):
        collect(collect_params(write(tmp_path / "a", content)), tmp_path / "raw")


def test_a_json_text_sequence_is_read(tmp_path: Path, collect_params: MakeParams) -> None:
    content = b'\x1e{"text": "one"}\n\x1e{"text": "two"}\n'
    collect(collect_params(write(tmp_path / "a", content)), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["one", "two"]


def test_numbers_are_never_texts_and_may_be_huge(tmp_path: Path, collect_params: MakeParams) -> None:
    """Python refuses to convert integers of more than 4,300 digits."""
    content = b'{"text": "one", "n": ' + b"9" * 5000 + b'}\n{"text": 7}\n{"text": -1.5}\n{"text": ["a"]}\n'
    counts = collect(collect_params(write(tmp_path / "a", content)), tmp_path / "raw")
    assert (counts["documents"], counts["rejected_no_text"]) == (1, 3)


def test_trailing_spaces_are_kept_on_request(tmp_path: Path, collect_params: MakeParams) -> None:
    source = write(tmp_path / "a.md", b"a line break  \nof Markdown\n", "text")
    collect(collect_params(source), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["a line break\nof Markdown"]
    collect(collect_params(source | {"keep_trailing_spaces": True}), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["a line break  \nof Markdown"]


def test_a_file_name_may_look_like_a_glob(tmp_path: Path, collect_params: MakeParams) -> None:
    write(tmp_path / "a1.txt", b"not this", "text")
    collect(collect_params(write(tmp_path / "a[1].txt", b"this", "text")), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["this"]
    (tmp_path / "b[1]").mkdir()
    write(tmp_path / "b[1]/a.txt", b"in a folder", "text")
    collect(collect_params({"kind": "text", "paths": (f"{tmp_path}/b[1]/*.txt",)}), tmp_path / "raw")
    assert texts_of(tmp_path / "raw") == ["in a folder"]


def test_a_file_has_one_name(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", b"text", "text")
    source = {"kind": "text", "paths": ("a.txt", "./a.txt", "*.txt")}
    assert collect(collect_params(source, dedup="none"), tmp_path / "raw")["documents_in"] == 1


def test_a_folder_in_paths_is_an_error_that_names_the_glob_of_its_files(
    tmp_path: Path, collect_params: MakeParams
) -> None:
    (tmp_path / "in").mkdir()
    for pattern in (f"{tmp_path}/in", f"{tmp_path}/*"):
        with pytest.raises(InputError) as caught:
            collect(collect_params({"kind": "text", "paths": (pattern,)}), tmp_path / "raw")
        assert f"{pattern}: a folder, not a file; {pattern}/**/* matches the files in it" in str(caught.value)


def test_files_about_the_data_are_counted_unless_they_are_named(
    tmp_path: Path, collect_params: MakeParams
) -> None:
    write(tmp_path / "a.jsonl", json_lines({"text": "one"}))
    write(tmp_path / "README.md", json_lines({"text": "two"}))
    write(tmp_path / ".DS_Store", b"\0")
    write(tmp_path / "a.jsonl.dvc", b"outs:\n- path: a.jsonl\n")
    write(tmp_path / "a.jsonl~", b"{")
    counts = collect(collect_params({"kind": "jsonl", "paths": (f"{tmp_path}/*",)}), tmp_path / "raw")
    assert (counts["documents_in"], counts["documents"], counts["rejected_other_file"]) == (4, 1, 3)
    named = {"kind": "jsonl", "paths": (f"{tmp_path}/*.jsonl", f"{tmp_path}/README.md")}
    assert collect(collect_params(named), tmp_path / "raw2")["documents"] == 2


def test_files_outside_of_data_sources_are_a_warning(
    tmp_path: Path,
    collect_params: MakeParams,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/sources").mkdir(parents=True)
    inside = write(Path("data/sources/a.txt"), b"inside", "text")
    outside = write(Path("b.txt"), b"outside", "text")
    collect(collect_params(inside), tmp_path / "raw")
    assert "warning" not in capsys.readouterr().err
    collect(collect_params(inside, outside), tmp_path / "raw")
    assert (
        "warning: b.txt: outside data/sources, so `dvc repro` does not notice changes"
        in capsys.readouterr().err
    )


def warning_about(params: CollectParams, capsys: pytest.CaptureFixture[str]) -> str:
    warn_about_files(parts.find_files(params.sources).paths, params.sources, "collect")
    return capsys.readouterr().err


def test_remote_files_and_packages_are_one_warning(
    collect_params: MakeParams, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC does not watch them, so a rerun says that nothing has changed."""
    remote = [
        {"kind": "jsonl", "paths": ("s3://bucket/a.jsonl", "https://example.com/*.jsonl")},
        {"kind": "python-code", "package": "packaging"},
    ]
    warning = warning_about(collect_params(*remote), capsys)
    assert warning == (
        "collect: warning: https://example.com/*.jsonl and 2 more: outside data/sources, so `dvc repro` does "
        "not notice changes; copy the files there, or run `dvc repro -f collect && dvc repro` after a change\n"
    )
    pinned = [
        {"kind": "url", "url": "https://example.com/a.txt", "sha256": "0" * 64},
        {"kind": "huggingface", "dataset": "someone/stories", "revision": "a" * 40},
        {"kind": "python-docs"},
    ]
    assert warning_about(collect_params(*pinned), capsys) == ""


def test_a_link_to_a_folder_is_outside_of_data_sources(
    tmp_path: Path,
    collect_params: MakeParams,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DVC does not follow it. It does follow a link to a file."""
    monkeypatch.chdir(tmp_path)
    Path("data/sources").mkdir(parents=True)
    Path("elsewhere").mkdir()
    inside = write(Path("elsewhere/a.txt"), b"text", "text")
    Path("data/sources/link.txt").symlink_to(tmp_path / "elsewhere/a.txt")
    Path("data/sources/folder").symlink_to(tmp_path / "elsewhere")
    linked = {**inside, "paths": ("data/sources/link.txt",)}
    assert warning_about(collect_params(linked), capsys) == ""
    for source in (
        {**inside, "paths": ("data/sources/folder/*.txt",)},
        {"kind": "huggingface", "dataset": "data/sources/folder"},
    ):
        assert "warning: data/sources/folder" in warning_about(collect_params(source), capsys)


def test_a_local_dataset_outside_of_data_sources_is_a_warning(
    tmp_path: Path,
    collect_params: MakeParams,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds").mkdir()
    params = collect_params({"kind": "huggingface", "dataset": "ds"})
    warn_about_files([[]], params.sources, "collect")
    assert "warning: ds: outside data/sources" in capsys.readouterr().err


def test_the_digest_of_a_local_dataset_includes_names(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` derives the split from the name. Here `train` gets another file; their order is the same."""
    monkeypatch.chdir(tmp_path)
    Path("ds").mkdir()
    params = collect_params({"kind": "huggingface", "dataset": "ds"})
    Path("ds/test.jsonl").write_bytes(b"one")
    Path("ds/train.jsonl").write_bytes(b"two")
    before = parts.find_files(params.sources).digests
    Path("ds/train.jsonl").rename("ds/validation.jsonl")
    Path("ds/test.jsonl").rename("ds/train.jsonl")
    assert parts.find_files(params.sources).digests != before


def test_a_local_dataset_is_hashed_once_for_all_shards(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` reads the folder whatever the revision says, so its files are hashed."""
    monkeypatch.chdir(tmp_path)
    Path("ds").mkdir()
    Path("ds/train.jsonl").write_bytes(json_lines({"text": "one"}))
    params = collect_params({"kind": "huggingface", "dataset": "ds", "revision": "a" * 40})
    hashed: list[str] = []
    monkeypatch.setattr(parts, "n_dataset_shards", lambda _: 9)
    monkeypatch.setattr(parts, "_sha256", lambda path: hashed.append(path) or "0" * 64)
    assert len(parts.plan_parts(params, parts.find_files(params.sources))) == 9
    assert hashed == ["ds/train.jsonl"]


def test_a_filter_that_rejects_nearly_all_is_a_warning(
    tmp_path: Path, collect_params: MakeParams, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b"".join(b"%d words\n" % i for i in range(19)) + b"a line of five words\n"
    source = write(tmp_path / "a.txt", lines, "text", document="line")
    collect(collect_params(source, filters={"words": (3, 9)}), tmp_path / "raw")
    assert "the filter words rejects 19 of 20 texts of text; is it meant for" in capsys.readouterr().err
    collect(collect_params(source, filters={"words": (2, 9)}), tmp_path / "raw")
    assert " of 20 texts" not in capsys.readouterr().err
    collect(collect_params(source, min_document_bytes=20), tmp_path / "raw")
    assert (
        "warning: 19 of 20 texts of text are rejected (too_short); lower collect.min_document_bytes"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "keys", "words"),
    [
        (b"", {}, r": the sources are empty; add text"),
        (
            json_lines({"text": "a"}, {"text": "b"}),
            {"min_document_bytes": 5},
            r"\(2 too_short\); lower collect.min_",
        ),
        (json_lines({"text": None}), {}, r"\(1 no_text\); check text_key"),
        (json_lines({"text": " "}), {}, r"\(1 empty\); the files contain no text"),
        (json_lines({"text": "\ud800"}), {}, r"\(1 lone_surrogates\); fix the escapes"),
        (
            json_lines({"text": "one two"}),
            {"filters": {"words": (3, 9)}},
            r"\(1 words\); relax or switch off coll",
        ),
    ],
)
def test_an_empty_corpus_is_an_error_that_says_what_to_do(
    tmp_path: Path, collect_params: MakeParams, content: bytes, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=rf"^collect: no document left of \d.*{words}"):
        collect(collect_params(write(tmp_path / "a", content), **keys), tmp_path / "raw")


def test_lines_without_the_key_in_one_part_are_not_a_wrong_key(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json_lines(*[{"deleted": True}] * 20, *({"text": f"text {i}"} for i in range(20)))
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    counts = collect(collect_params(write(tmp_path / "a", content)), tmp_path / "raw")
    assert (counts["documents"], counts["rejected_no_text"]) == (20, 20)


def test_a_wrong_key_of_a_large_file_lists_the_keys_too(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    source = write(tmp_path / "a", json_lines(*({"content": f"text {i}"} for i in range(20))))
    with pytest.raises(InputError, match=r"20 no_text\).*line 1: no key `text`; the keys are content\)"):
        collect(collect_params(source), tmp_path / "raw")

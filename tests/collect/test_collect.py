"""Stage collect: every text that comes in is kept or counted, and the same sources give the same bytes."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptpipe.base.files import sha256_of
from gptpipe.base.manifest import verify
from gptpipe.collect import candidates, parts, shards
from gptpipe.collect import collect as collecting
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.formats.corpus import shard_paths
from gptpipe.shell.errors import InputError, ResourceError

MakeParams = Callable[..., CollectParams]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for shard in sorted(folder.glob("docs-*.parquet")) for row in pq.read_table(shard).to_pylist()]


def write_lines(path: Path, *lines: str) -> dict[str, Any]:
    path.write_text("".join(f"{line}\n" for line in lines))
    return {"kind": "text", "paths": (str(path),), "document": "line"}


def test_a_row_has_id_source_text_and_bytes(tmp_path: Path, collect_params: MakeParams) -> None:
    lines = write_lines(tmp_path / "a.txt", "one", "zwölf ")
    records = tmp_path / "b.jsonl"
    records.write_text(json.dumps({"text": "three"}))
    counts = collect(collect_params(lines, {"kind": "jsonl", "paths": (str(records),)}), tmp_path / "raw")
    assert rows(tmp_path / "raw") == [
        {"id": hashlib.sha256(text.encode()).hexdigest(), "source": source, "text": text, "n_bytes": n_bytes}
        for text, source, n_bytes in (("one", "text", 3), ("zwölf", "text", 6), ("three", "jsonl", 5))
    ]
    assert counts == {"documents_in": 3, "documents": 3, "bytes": 14, "cut": 0}
    manifest = verify(tmp_path / "raw")
    assert manifest.counts == counts
    assert manifest.made_from == {str(path): sha256_of(path) for path in (tmp_path / "a.txt", records)}


def test_sources_of_one_kind_are_numbered(tmp_path: Path, collect_params: MakeParams) -> None:
    sources = [write_lines(tmp_path / name, name) for name in ("b.txt", "a.txt")]
    collect(collect_params(*sources), tmp_path / "raw")
    assert [(row["text"], row["source"]) for row in rows(tmp_path / "raw")] == [
        ("b.txt", "text-0"),
        ("a.txt", "text-1"),
    ]


def test_documents_in_are_kept_plus_rejected_by_reason(tmp_path: Path, collect_params: MakeParams) -> None:
    good = write_lines(tmp_path / "good.txt", *[f"document number {i}" for i in range(99)])
    (tmp_path / "binary").write_bytes(b"\0")
    (tmp_path / "empty").write_bytes(b"")
    records = tmp_path / "records.jsonl"
    records.write_text(
        '{"text": "lone \\udfff"}\n{"text": "document number 7"}\n{"text": "tiny"}\n{}\n' + '{"text": " "}'
    )
    params = collect_params(
        good,
        {"kind": "text", "paths": (str(tmp_path / "binary"), str(tmp_path / "empty"))},
        {"kind": "jsonl", "paths": (str(records),)},
        min_document_bytes=8,
    )
    counts = collect(params, tmp_path / "raw")
    assert counts == {
        "documents_in": 106,
        "documents": 99,
        "bytes": 10 * 17 + 89 * 18,
        "cut": 0,
        "rejected_binary": 1,
        "rejected_empty": 2,
        "rejected_lone_surrogates": 1,
        "rejected_duplicate": 1,
        "rejected_too_short": 1,
        "rejected_no_text": 1,
    }
    assert len(rows(tmp_path / "raw")) == 99


def test_the_first_of_equal_texts_is_kept_across_sources(tmp_path: Path, collect_params: MakeParams) -> None:
    sources = [
        write_lines(tmp_path / "a.txt", "one", "two", "one  "),
        write_lines(tmp_path / "b.txt", "two", "three"),
    ]
    assert collect(collect_params(*sources), tmp_path / "raw")["rejected_duplicate"] == 2
    assert [(row["source"], row["text"]) for row in rows(tmp_path / "raw")] == [
        ("text-0", "one"),
        ("text-0", "two"),
        ("text-1", "three"),
    ]
    counts = collect(collect_params(*sources, dedup="none"), tmp_path / "raw")
    assert counts["documents"] == 5
    assert "rejected_duplicate" not in counts


def test_a_file_with_windows_line_ends_has_the_same_ids(tmp_path: Path, collect_params: MakeParams) -> None:
    content = "Grüße,\n\n  text\nof several lines " + "and more " * 20
    (tmp_path / "unix.txt").write_bytes(content.encode())
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    for limit in (1000, 64):
        for name in ("unix", "windows"):
            source = {"kind": "text", "paths": (f"{tmp_path}/{name}.txt",)}
            collect(collect_params(source, max_document_bytes=limit), tmp_path / f"{name}-{limit}")
        assert rows(tmp_path / f"unix-{limit}") == rows(tmp_path / f"windows-{limit}")


def test_text_with_replaced_bytes_is_counted(tmp_path: Path, collect_params: MakeParams) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\ntea\n")
    source = {"kind": "text", "paths": (f"{tmp_path}/a.txt",), "document": "line"}
    counts = collect(collect_params(source, encoding_errors="replace"), tmp_path / "raw")
    assert counts["with_replacement_character"] == 1
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 at byte 3;"):
        collect(collect_params(source), tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no document left of 1 (1 empty)"), (b"\0", "no document left of 1 (1 binary)")],
)
def test_no_document_left_is_an_input_error_with_the_counts(
    tmp_path: Path, collect_params: MakeParams, content: bytes, words: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError) as caught:
        collect(collect_params({"kind": "text", "paths": (f"{tmp_path}/a.txt",)}), tmp_path / "raw")
    assert words in str(caught.value)
    assert not (tmp_path / "raw").exists()


def test_a_bad_source_keeps_the_old_corpus(tmp_path: Path, collect_params: MakeParams) -> None:
    collect(collect_params(write_lines(tmp_path / "a.txt", "old")), tmp_path / "raw")
    (tmp_path / "b.txt").write_bytes(b"new\xff")
    with pytest.raises(InputError):
        collect(collect_params({"kind": "text", "paths": (f"{tmp_path}/b.txt",)}), tmp_path / "raw")
    verify(tmp_path / "raw")
    assert [row["text"] for row in rows(tmp_path / "raw")] == ["old"]


def test_an_unwritable_target_is_a_resource_error(tmp_path: Path, collect_params: MakeParams) -> None:
    with pytest.raises(ResourceError, match=r"a\.txt/raw: cannot write: Not a directory"):
        collect(collect_params(write_lines(tmp_path / "a.txt", "one")), tmp_path / "a.txt" / "raw")


def test_shards_are_cut_by_size_and_keep_the_order(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20)
    lines = [f"line {i:04d}" for i in range(10)]  # 9 bytes each: a shard is full with the third
    params = collect_params(write_lines(tmp_path / "a.txt", *lines))
    collect(params, tmp_path / "raw")
    assert [path.name for path in shard_paths(tmp_path / "raw")] == [f"docs-{i:05d}.parquet" for i in range(4)]
    assert [row["text"] for row in rows(tmp_path / "raw")] == lines
    ids = [hashlib.sha256(line.encode()).hexdigest() for line in lines]
    assert [row["id"] for row in rows(tmp_path / "raw")] == ids
    collect(params, tmp_path / "again")
    assert verify(tmp_path / "again").digest == verify(tmp_path / "raw").digest


def mixed_sources(folder: Path) -> list[dict[str, Any]]:
    """Three sources with equal texts, rejections and cuts; two have limits, one has a weight."""
    texts = [f"text {i % 700} {'with a tail ' * (i % 40)}" for i in range(1500)]
    texts[7::50] = ["lone \ud800"] * 30
    texts[11::60] = [" \x00\r\n"] * 25
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{}\n")
    lines = write_lines(folder / "b.txt", *(f"line {i} \u00e9 \x07" for i in range(1000)), *(["text 1"] * 9))
    records = {"kind": "jsonl", "paths": (f"{folder}/a.jsonl",)}
    return [records | {"max_documents": 400}, lines | {"weight": 0.5, "max_bytes": 3000}, records]


def small_sizes(monkeypatch: pytest.MonkeyPatch, *, parts: int = 30_000, shards: int = 15_000) -> None:
    """A small corpus has several parts and shards."""
    monkeypatch.setattr("gptpipe.collect.parts.PART_BYTES", parts)
    monkeypatch.setattr("gptpipe.collect.shards.SHARD_BYTES", shards)


def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sizes(monkeypatch, shards=30_000)
    params = collect_params(
        *mixed_sources(tmp_path), max_document_bytes=300, min_document_bytes=7, dedup="near"
    )
    outcomes = []
    for workers, many_bytes in (("1", 1 << 30), ("1", 0), ("2", 0), ("3", 0)):
        monkeypatch.setenv("GPTPIPE_WORKERS", workers)
        monkeypatch.setattr(collecting, "_MANY_BYTES", many_bytes)
        counts = collect(params, tmp_path / "raw", tmp_path / "report.md")
        outcomes.append((counts, verify(tmp_path / "raw").digest, (tmp_path / "report.md").read_bytes()))
    assert outcomes[0] == outcomes[1] == outcomes[2] == outcomes[3]
    counts = outcomes[0][0]
    assert counts["documents_in"] == counts["documents"] + sum(
        n for name, n in counts.items() if "rejected" in name
    )
    assert counts["cut"] > 100
    assert counts["rejected_near_duplicate"] > 100
    assert len(shard_paths(tmp_path / "raw")) > 3


@pytest.mark.parametrize("part_bytes", [5_000, 1 << 25])
def test_limits_and_weights(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    """A source ends at its limit, whatever the parts, and the texts behind it are not counted."""
    small_sizes(monkeypatch, parts=part_bytes)
    params = collect_params(*mixed_sources(tmp_path), max_document_bytes=10_000, min_document_bytes=7)
    counts = collect(params, tmp_path / "raw")
    by_source = Counter(row["source"] for row in rows(tmp_path / "raw"))
    assert by_source["jsonl-0"] == 400
    assert 3000 <= sum(row["n_bytes"] for row in rows(tmp_path / "raw") if row["source"] == "text") < 3015
    texts = [row["text"] for row in rows(tmp_path / "raw")]
    assert len(texts) == len(set(texts)) == counts["documents"]
    # 417 texts up to the 400th document of the first source, then lines up to the limit, and all of the third.
    last_line = [row["text"] for row in rows(tmp_path / "raw") if row["source"] == "text"][-1]
    assert counts["documents_in"] == 417 + (int(last_line.split()[1]) + 1) + 1501


def test_a_limit_that_duplicates_delay(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker stops reading at the limit of the source, but the first texts turn out to be known already."""
    known = write_lines(tmp_path / "a.txt", *(f"line {i}" for i in range(50)))
    longer = write_lines(tmp_path / "b.txt", *(f"line {i}" for i in range(100))) | {"max_documents": 10}
    counts = collect(collect_params(known, longer), tmp_path / "raw")
    assert counts == {
        "documents_in": 110,
        "documents": 60,
        "bytes": counts["bytes"],
        "cut": 0,
        "rejected_duplicate": 50,
    }
    assert [row["text"] for row in rows(tmp_path / "raw")][50:] == [f"line {i}" for i in range(50, 60)]


def test_parts_behind_a_limit_are_not_read(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sizes(monkeypatch, parts=1000)
    read, really = list[int](), candidates.read_part
    monkeypatch.setattr(
        candidates, "read_part", lambda part, *rest: read.append(part.start) or really(part, *rest)
    )
    lines = write_lines(tmp_path / "a.txt", *(f"line {i}" for i in range(1000)))
    collect(collect_params(lines | {"max_documents": 200}), tmp_path / "raw")
    assert read == [0, 1000]


KILLED = """
import os, sys
from pathlib import Path
from gptpipe.collect.params import CollectParams
from gptpipe.collect import candidates, collect, parts, shards
parts.PART_BYTES, shards.SHARD_BYTES = 30_000, 15_000
kind, number = sys.argv[2:]
n_calls = 0
def killed_at(number, function):
    def call(*arguments, **options):
        global n_calls
        n_calls += 1
        if n_calls == number:
            os.kill(os.getpid(), 9)
        return function(*arguments, **options)
    return call
if kind == "part":
    candidates.read_part = killed_at(int(number), candidates.read_part)
elif kind == "shard":
    shards.write_shard = killed_at(int(number), shards.write_shard)
else:
    collect.find_files = killed_at(2, collect.find_files)
collect.collect(CollectParams.model_validate_json(sys.argv[1]), Path("raw"), Path("report.md"))
"""


def kill(folder: Path, params: CollectParams, kind: str, number: int) -> None:
    arguments = [sys.executable, "-c", KILLED, params.model_dump_json(), kind, str(number)]
    assert subprocess.run(arguments, cwd=folder).returncode == -9
    assert not (folder / "raw").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dedup", ["exact", "near"])
@pytest.mark.parametrize(("kind", "number"), [("part", 7), ("shard", 4), ("end", 0)])
def test_after_a_kill_finished_parts_and_shards_are_kept(
    tmp_path: Path,
    collect_params: MakeParams,
    monkeypatch: pytest.MonkeyPatch,
    dedup: str,
    kind: str,
    number: int,
) -> None:
    """The corpus has the same bytes as without a kill, also if a finished file is damaged."""
    small_sizes(monkeypatch)
    params = collect_params(*mixed_sources(tmp_path), max_document_bytes=300, min_document_bytes=7, dedup=dedup)
    counts = collect(params, tmp_path / "undisturbed", tmp_path / "undisturbed.md")
    n_parts = len(parts.plan_parts(params, parts.find_files(params.sources)))
    n_shards = len(shard_paths(tmp_path / "undisturbed"))
    kill(tmp_path, params, kind, number)
    done = {"part": (number - 1, 0), "shard": (n_parts, number - 1), "end": (n_parts, n_shards)}[kind]
    damaged = sorted(tmp_path.glob(".raw.*.partial/.parts/*/documents.arrow"))[:1]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-9])

    made_parts, made_shards = list[str](), list[str]()
    read_part, write_shard = candidates.read_part, shards.write_shard
    monkeypatch.setattr(
        candidates, "read_part", lambda part, *a: made_parts.append(part.name) or read_part(part, *a)
    )
    monkeypatch.setattr(
        shards, "write_shard", lambda path, *a: made_shards.append(path.name) or write_shard(path, *a)
    )
    assert collect(params, tmp_path / "raw", tmp_path / "report.md") == counts
    assert len(damaged) <= len(made_parts) <= n_parts - done[0] + len(damaged)
    assert len(made_shards) == n_shards - done[1]
    assert verify(tmp_path / "raw").digest == verify(tmp_path / "undisturbed").digest
    assert (tmp_path / "report.md").read_bytes() == (tmp_path / "undisturbed.md").read_bytes()
    assert not list(tmp_path.glob(".raw*"))


def test_leftovers_of_a_kill_are_used_only_where_nothing_has_changed(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sizes(monkeypatch)
    params = collect_params(*mixed_sources(tmp_path), max_document_bytes=300)
    kill(tmp_path, params, "shard", 4)
    assert len(list(tmp_path.glob(".raw.*.partial/docs-*"))) == 3
    write_lines(tmp_path / "b.txt", "another line")
    read, really = list[tuple[str, ...]](), candidates.read_part
    monkeypatch.setattr(
        candidates, "read_part", lambda part, *a: read.append(part.addresses) or really(part, *a)
    )
    collect(params, tmp_path / "raw")
    assert read == [(f"{tmp_path}/b.txt",)]
    collect(params, tmp_path / "undisturbed")
    assert verify(tmp_path / "raw").digest == verify(tmp_path / "undisturbed").digest
    assert not list(tmp_path.glob(".raw*"))


def test_after_an_error_finished_parts_are_kept(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error names all bad files; after they are fixed, only they are read again."""
    small_sizes(monkeypatch, parts=10)
    sources = [write_lines(tmp_path / f"{name}.txt", f"text {name}") for name in "abc"]
    (tmp_path / "b.txt").write_bytes(b"text \xff\n")
    (tmp_path / "c.txt").write_bytes(b"text \xff\n")
    params = collect_params(*sources)
    with pytest.raises(InputError, match=r"b\.txt: not UTF-8 at byte 5; .*c\.txt: not UTF-8 at byte 5; "):
        collect(params, tmp_path / "raw")
    for name in "bc":
        write_lines(tmp_path / f"{name}.txt", f"text {name}")
    read, really = list[tuple[str, ...]](), candidates.read_part
    monkeypatch.setattr(
        candidates, "read_part", lambda part, *a: read.append(part.addresses) or really(part, *a)
    )
    assert collect(params, tmp_path / "raw")["documents"] == 3
    assert read == [(f"{tmp_path}/b.txt",), (f"{tmp_path}/c.txt",)]
    assert not list(tmp_path.glob(".raw*"))


def test_a_source_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "a.txt", "one", "two")
    really = collecting.plan_shards
    monkeypatch.setattr(
        collecting,
        "plan_shards",
        lambda decisions: write_lines(tmp_path / "a.txt", "six") and really(decisions),
    )
    with pytest.raises(InputError, match="a source changed while it was read"):
        collect(collect_params(lines), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_a_batch_is_limited_even_if_a_chunk_has_many_texts(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk can have a quarter of a million blank lines, and each becomes a rejection."""
    (tmp_path / "a.txt").write_text("\n" * 100_000 + "text\n")
    clean, sizes = candidates.clean, list[int]()
    monkeypatch.setattr(
        candidates, "clean", lambda texts, *a, **k: sizes.append(len(texts)) or clean(texts, *a, **k)
    )
    source = {"kind": "text", "paths": (f"{tmp_path}/a.txt",), "document": "line"}
    assert collect(collect_params(source), tmp_path / "raw")["rejected_empty"] == 100_000
    assert sum(sizes) == 100_001
    assert max(sizes) <= 8192


@pytest.mark.parametrize(
    ("line", "fault"), [(b"{bad\n", "line 4: not JSON"), (b"\xff\n", "not UTF-8 at byte 50")]
)
def test_errors_and_texts_after_a_limit_have_no_effect(
    tmp_path: Path, collect_params: MakeParams, line: bytes, fault: str
) -> None:
    """Texts are read ahead: an error after the limit, or a text that was not used, must have no effect."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n' + line)
    limited = {"kind": "jsonl", "paths": (f"{tmp_path}/a.jsonl",), "max_documents": 2}
    counts = collect(collect_params(limited, write_lines(tmp_path / "b.txt", "three")), tmp_path / "raw")
    assert counts == {"documents_in": 3, "documents": 3, "bytes": 11, "cut": 0}
    with pytest.raises(InputError, match=rf"a\.jsonl.* {fault}"):
        collect(collect_params(limited | {"max_documents": 4}), tmp_path / "raw")
    table = {"text": pa.array([b"one", b"two", b"three", b"\xff"]).view(pa.string())}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthree\n" + "\u00e9".encode() * 9 + b"\xff\n")
    lines = limited | {"kind": "text", "paths": (f"{tmp_path}/a.txt",), "document": "line"}
    assert collect(collect_params(lines), tmp_path / "raw")["documents_in"] == 2
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 at byte 32"):
        collect(collect_params(lines | {"max_documents": 4}), tmp_path / "raw")
    limited |= {"kind": "parquet", "paths": (f"{tmp_path}/a.parquet",)}
    assert collect(collect_params(limited), tmp_path / "raw")["documents_in"] == 2
    with pytest.raises(InputError, match=r"a\.parquet, column `text`, row 4: not UTF-8 at byte 0"):
        collect(collect_params(limited | {"max_documents": 4}), tmp_path / "raw")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, kind: str) -> None:
    """Ten times the text needs at most a tenth more memory, even in one line of 10 MB or one row group."""
    program = """
import sys
from pathlib import Path
from gptpipe.base import parquet
from gptpipe.collect.params import CollectParams
from gptpipe.params import load_params
from gptpipe.collect import shards
from gptpipe.formats.corpus import shard_paths
from gptpipe.collect.collect import collect
source = {"kind": sys.argv[3], "paths": (sys.argv[1],)}
if sys.argv[3] == "text":
    source["document"] = "line"
changed = {"sources": (source,), "min_document_bytes": 1, "max_document_bytes": 100_000, "max_expansion": 9}
params = CollectParams.model_validate({**dict(load_params().collect), **changed, "dedup": "none"})
parquet._GROUP_BYTES, shards.SHARD_BYTES = 1 << 18, 1 << 20  # a small corpus fills several
collect(params, Path(sys.argv[2]))
print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])  # ru_maxrss starts at the parent's
"""
    peaks = []
    for name, n_lines in (("small", 4_000), ("large", 40_000)):
        if kind == "text":
            with (tmp_path / name).open("w") as file:
                file.writelines(f"{i} " * 80 + "\n" for i in range(n_lines))
                file.write("a" * 250 * n_lines)
        else:
            texts = [os.urandom(500).hex() for _ in range(n_lines)]
            pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=n_lines)
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / name, tmp_path / f"raw-{name}", kind],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.1 * peaks[0]


@pytest.mark.slow
def test_python_docs_are_thousands_of_real_texts_and_the_same_in_every_process(tmp_path: Path) -> None:
    """The other process has another hash seed, and a foreign function replaces one of Python's own."""
    program = """
import sys
def foreign(*arguments):
    "Not of the standard library."
sys.excepthook = foreign
from gptpipe.collect.python_text import python_docs
sys.stdout.buffer.write("\\0".join(dict.fromkeys(python_docs())).encode())
"""

    def printed(program: str, hash_seed: int) -> bytes:
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout

    plain = printed(program.replace("sys.excepthook = foreign\n", ""), 1)
    assert printed(program, 7) == plain
    texts = plain.decode().split("\0")
    assert len(texts) > 3000
    assert sum(map(len, texts)) > 1_500_000
    assert any('The "with" statement' in text for text in texts)
    assert any("Return a copy of the string" in text for text in texts)
    # "Basic customization" is a topic of its own, and a section of "Special method names".
    assert sum("Called to create a new instance of class" in text for text in texts) == 1

"""`gptpipe data`: its page after each stage, on the terminal, in reports/ and in the MLflow run."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny import make_split

from gptpipe.base.manifest import read_manifest
from gptpipe.commands.cli import main
from gptpipe.commands.data import write_page
from gptpipe.formats.corpus import shard_paths
from gptpipe.record.store import connect
from gptpipe.shell.errors import IntegrityError

OVERLAPS = {"share": {"train": 0, "val": 0.25}, "val_examined": 8}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with raw, tokens and split, and the reports of collect and split."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "data").mkdir()
    make_split(tmp_path / "data")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/split.json").write_text(json.dumps(OVERLAPS))
    (tmp_path / "reports/collect.md").write_text("# Heading\n\n| source | kept |\n")
    return tmp_path


def rows(page: str) -> dict[str, str]:
    """The page's first table: name -> value."""
    return dict(re.findall(r"^\| ([a-z].*?) \| (.*) \|$", page, re.MULTILINE))


def documents_shown(page: str, heading: str, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents below a heading, after comparing source, size and text of each with the corpus."""
    shown = re.findall(rf"^{heading}: (.*), ([\d,]+) bytes, (\w+)\n\n> (.*)$", page, re.MULTILINE)
    matches = []
    for source, n_bytes, id_, text in shown:
        document = next(document for document in documents if document["id"].startswith(id_))
        assert document["source"] == source
        assert str(document["n_bytes"]) == n_bytes
        assert document["text"][:300] == text
        matches.append(document)
    return matches


def test_page_has_the_counts_of_every_stage(root: Path) -> None:
    table = rows(write_page(root, 0))
    raw, tokens, split = (read_manifest(root / "data" / name).counts for name in ("raw", "tokens", "split"))
    assert table["documents"] == str(raw["documents"]) == "90"
    assert table["bytes per token"] == f"{raw['bytes'] / tokens['tokens']:.2f}"
    assert table["source text-0"].startswith("30 documents, ")
    assert table["train"].split(" documents")[0] == str(split["train_documents"])
    assert table["overlap of val with train"] == "25.0% of 8 documents"
    assert "overlap of train with train" not in table


def test_an_unknown_overlap_is_not_a_number(root: Path) -> None:
    overlaps = {"benchmark-0_examined": 0, "share": {"benchmark-0": None}}
    (root / "reports/split.json").write_text(json.dumps(overlaps))
    overlap = rows(write_page(root, 0))["overlap of benchmark-0 with train"]
    assert overlap == "unknown: all documents are too short"


def test_page_shows_lengths_and_documents(root: Path) -> None:
    page = write_page(root, 0)
    documents = [row for shard in shard_paths(root / "data/raw") for row in pq.read_table(shard).to_pylist()]
    sizes = sorted(document["n_bytes"] for document in documents)
    histogram = re.findall(r"^\| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert sum(int(n) for _, n in histogram) == len(documents)
    for limit, n in histogram:
        assert int(n) == sum(int(limit) / 2 < size <= int(limit) for size in sizes)
    assert [document["n_bytes"] for document in documents_shown(page, "longest", documents)] == sizes[::-1][:3]
    assert [document["n_bytes"] for document in documents_shown(page, "shortest", documents)] == sizes[:3]
    drawn = documents_shown(page, "drawn by seed 0", documents)
    assert len(drawn) == 3
    assert drawn != documents_shown(write_page(root, 1), "drawn by seed 1", documents)


def test_page_is_written_to_reports(root: Path) -> None:
    page = write_page(root, 0)
    assert page.endswith("## Kept and rejected\n\n| source | kept |\n\n")
    assert (root / "reports/data.md").read_text() == page
    assert (root / "reports/data.svg").read_text().startswith("<svg")


def test_page_needs_stage_collect_only(root: Path) -> None:
    for folder in ("data/split", "data/tokens", "reports"):
        shutil.rmtree(root / folder)
    table = rows(write_page(root, 0))
    assert set(table) == {"documents", "bytes", "source text-0", "source text-1", "bytes, at most"}


def test_tokens_of_another_corpus_are_not_shown(root: Path) -> None:
    manifest = read_manifest(root / "data/tokens")
    changed = manifest.model_copy(update={"made_from": {**manifest.made_from, "raw": "0" * 64}})
    (root / "data/tokens/manifest.json").write_bytes(changed.to_bytes())
    assert "bytes per token" not in rows(write_page(root, 0))


def test_missing_corpus_is_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="dvc repro"):
        write_page(tmp_path, 0)


def test_damaged_corpus_is_an_error_before_anything_is_written(root: Path) -> None:
    shutil.rmtree(root / "reports")
    shard = shard_paths(root / "data/raw")[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="docs-00000"):
        write_page(root, 0)
    assert not (root / "reports").exists()


DAMAGED_REPORTS = {
    "empty": b"",
    "cut": b'{"share": {"val": 0.2',
    "not an object": b"[]",
    "without the number of documents": b'{"share": {"val": 0.25}}',
    "share is not a number": b'{"share": {"val": [1]}, "val_examined": 8}',
    "number is infinite": b'{"share": {"val": 0.25}, "val_examined": Infinity}',
    "nested": b"[" * 100_000,
    "not UTF-8": b"\xff",
}


@pytest.mark.parametrize("content", DAMAGED_REPORTS.values(), ids=DAMAGED_REPORTS.keys())
def test_damaged_split_report_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (root / "reports/split.json").write_bytes(content)
    assert run_in(root, monkeypatch) == 4
    message = "error: reports/split.json: damaged, not a report of stage split; `dvc repro` restores it\n"
    assert capsys.readouterr().err == message


def test_damaged_collect_report_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "reports/collect.md").write_bytes(b"\xff")
    assert run_in(root, monkeypatch) == 4
    assert capsys.readouterr().err == "error: reports/collect.md: damaged, not UTF-8; `dvc repro` restores it\n"


@pytest.mark.parametrize("name", ["split.json", "collect.md"])
def test_folder_in_place_of_a_report_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (root / "reports" / name).unlink()
    (root / "reports" / name).mkdir()
    assert run_in(root, monkeypatch) == 4
    assert capsys.readouterr().err == f"error: reports/{name}: Is a directory; `dvc repro` restores it\n"


def run_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `gptpipe data` in `root`."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["gptpipe", "data"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.slow
def test_page_is_printed_and_logged_to_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    client = connect()
    run_id = client.create_run(client.get_experiment_by_name("gptpipe").experiment_id).info.run_id
    (root / "reports/mlflow_run.json").write_text(json.dumps({"run_id": run_id}))
    monkeypatch.setattr(sys, "argv", ["gptpipe", "data", "--seed", "1"])
    main()
    assert "bytes per token" in capsys.readouterr().out
    logged = Path(client.download_artifacts(run_id, "data.md", str(root)))
    assert logged.read_text() == (root / "reports/data.md").read_text()
    (root / "reports/mlflow_run.json").write_text(json.dumps({"run_id": "0" * 32}))
    main()  # a run that the store does not know is no error

"""`gptpipe data`: what there is after each stage, in the terminal, in reports/ and in the run."""

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
from gptpipe.commands.data import view_data
from gptpipe.formats.corpus import shard_paths
from gptpipe.record.store import connect
from gptpipe.shell.errors import IntegrityError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    make_split(tmp_path / "data")
    return tmp_path


def figures(page: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([a-z].*?) \| (.*) \|$", page, re.MULTILINE))


def shown(page: str, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents under a heading, each with the text, bytes and id of the same one."""
    pattern = rf"^{name}: (.*), ([\d,]+) bytes, (\w+)\n\n> (.*)$"
    found = [
        next(row for row in rows if row["id"].startswith(one[2])) for one in re.findall(pattern, page, re.MULTILINE)
    ]
    assert [(row["source"], str(row["n_bytes"]), row["id"][:12], row["text"][:300]) for row in found] == re.findall(
        pattern, page, re.MULTILINE
    )
    return found


def test_it_shows_what_there_is_after_each_stage(root: Path) -> None:
    (root / "reports").mkdir()
    (root / "reports/split.json").write_text(json.dumps({"share": {"train": 0, "val": 0.25}, "val_examined": 8}))
    (root / "reports/collect.md").write_text("# What\n\n| text | lost |\n")
    page = view_data(root, 0)
    raw, tokens = (read_manifest(root / "data" / name).counts for name in ("raw", "tokens"))
    found = figures(page)
    assert found["documents"] == str(raw["documents"]) == "90"
    assert found["bytes per token"] == f"{raw['bytes'] / tokens['tokens']:.2f}"
    assert found["source text-0"].startswith("30 documents, ")
    assert found["overlap of val with train"] == "25.0% of 8 documents"
    assert found["train"].split(" documents")[0] == str(read_manifest(root / "data/split").counts["train_documents"])
    assert "## Left out\n\n| text | lost |\n" in page
    rows = [row for shard in shard_paths(root / "data/raw") for row in pq.read_table(shard).to_pylist()]
    for length, n in re.findall(r"^\| (\d+) \| (\d+) \|$", page, re.MULTILINE):
        assert int(n) == sum(int(length) / 2 < row["n_bytes"] <= int(length) for row in rows)
    by_length = sorted(row["n_bytes"] for row in rows)
    for name, lengths in (("longest", by_length[::-1][:3]), ("shortest", by_length[:3])):
        assert [row["n_bytes"] for row in shown(page, name, rows)] == lengths
    assert shown(page, "drawn by seed 0", rows) != shown(view_data(root, 1), "drawn by seed 1", rows)
    view_data(root, 0)
    assert (root / "reports/data.md").read_text() == page
    assert (root / "reports/data.svg").read_text().startswith("<svg")
    for folder in ("data/split", "data/tokens", "reports"):
        shutil.rmtree(root / folder)
    assert set(figures(view_data(root, 0))) == {"documents", "bytes", "source text-0", "source text-1", "bytes, up to"}


def test_what_was_made_of_another_corpus_is_not_shown(root: Path) -> None:
    manifest = read_manifest(root / "data/tokens")
    changed = manifest.model_copy(update={"made_from": {**manifest.made_from, "raw": "0" * 64}})
    (root / "data/tokens/manifest.json").write_bytes(changed.to_bytes())
    assert "bytes per token" not in figures(view_data(root, 0))


def test_without_a_corpus_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="dvc repro"):
        view_data(tmp_path, 0)


def test_the_page_goes_to_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / ".dvc").mkdir()
    monkeypatch.chdir(root)
    client = connect()
    run_id = client.create_run(client.get_experiment_by_name("gptpipe").experiment_id).info.run_id
    (root / "reports").mkdir()
    (root / "reports/mlflow_run.json").write_text(json.dumps({"run_id": run_id}))
    monkeypatch.setattr(sys, "argv", ["gptpipe", "data", "--seed", "1"])
    main()
    assert "bytes per token" in capsys.readouterr().out
    logged = Path(client.download_artifacts(run_id, "data.md", str(root)))
    assert logged.read_text() == (root / "reports/data.md").read_text()
    (root / "reports/mlflow_run.json").write_text(json.dumps({"run_id": "0" * 32}))
    main()  # a run that the store does not know


def test_a_damaged_corpus_is_told_before_it_is_read(root: Path) -> None:
    shard = shard_paths(root / "data/raw")[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="docs-00000"):
        view_data(root, 0)
    assert not (root / "reports").exists()

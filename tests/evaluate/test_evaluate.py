"""Stage evaluate on a toy model: its reports, and what it refuses."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import tiny
from toy_project import Project

from gptpipe.base.manifest import verify
from gptpipe.evaluate.evaluate import documents_digest, evaluate_model
from gptpipe.formats.streams import open_stream
from gptpipe.shell.errors import IntegrityError

METRICS = {
    *("loss", "perplexity", "bits_per_byte", "token_accuracy"),
    *(f"{name}_standard_error" for name in ("loss", "perplexity", "bits_per_byte", "token_accuracy")),
    *("n_tokens", "n_bytes", "n_documents", "calibration_error"),
    *("bits_per_byte_overlapping", "bits_per_byte_overlapping_standard_error"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, toy_split: Path) -> Project:
    """A project after stage train."""
    project = Project(tmp_path_factory.mktemp("project"), toy_split)
    project.train(tiny.params())
    return project


def test_the_reports_of_an_evaluation(project: Project, tmp_path: Path) -> None:
    params = tiny.params()
    evaluation = evaluate_model(project.root / "models/gpt", project.split, tmp_path, params.evaluate, params.seed)
    results = json.loads((tmp_path / "eval.json").read_bytes())
    assert results == evaluation.results
    assert set(results["val"]) == set(results["test"]) == METRICS
    trained = json.loads((project.root / "reports/train.json").read_bytes())
    assert results["val"]["loss"] == pytest.approx(trained["val"]["loss"], rel=1e-9)  # one definition of loss
    assert set(results["by_source"]["test"]) == {"text-0", "text-1"}
    parts = results["by_source"]["test"].values()
    assert sum(part["n_tokens"] for part in parts) == results["test"]["n_tokens"]
    assert sum(part["loss"] * part["n_tokens"] for part in parts) / results["test"]["n_tokens"] == pytest.approx(
        results["test"]["loss"]
    )
    assert results["test_digest"] == documents_digest(open_stream(project.split, "test"))
    positions = pd.read_csv(tmp_path / "eval.positions.csv")
    assert positions.groupby("split")["position"].apply(list).to_dict() == {s: [*range(16)] for s in ("test", "val")}
    assert len(pd.read_csv(tmp_path / "eval.sources.csv")) == 4
    samples = (tmp_path / "samples.md").read_text()
    assert "**the **" in samples
    assert "--- real" in samples
    card = (tmp_path / "model_card.md").read_text()
    assert f"{results['test']['loss']:.4f} ± {results['test']['loss_standard_error']:.4f}" in card
    assert card.startswith((project.root / "models/gpt/README.md").read_text())
    documents = evaluation.documents[evaluation.documents["split"] == "test"]
    assert documents["nats"].sum() / documents["n_bytes"].sum() / math.log(2) == pytest.approx(
        results["test"]["bits_per_byte"]
    )
    verify(project.root / "models/gpt")  # the output of stage train is unchanged


def test_metrics_have_the_names_of_the_tracking_store(project: Project, tmp_path: Path) -> None:
    params = tiny.params()
    evaluation = evaluate_model(project.root / "models/gpt", project.split, tmp_path, params.evaluate, params.seed)
    metrics = evaluation.metrics()
    assert {f"{side}/{name}" for side in ("val", "test") for name in METRICS} <= set(metrics)
    assert {"test/xz_bits_per_byte", "val/unigram_bits_per_byte", "continuations/bleu"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_model_of_another_split_is_refused(project: Project, tmp_path: Path) -> None:
    other = tiny.make_split(tmp_path, n_documents=91)
    params = tiny.params()
    with pytest.raises(IntegrityError, match="was trained on another split"):
        evaluate_model(project.root / "models/gpt", other, tmp_path / "reports", params.evaluate, params.seed)
    assert not (tmp_path / "reports").exists()

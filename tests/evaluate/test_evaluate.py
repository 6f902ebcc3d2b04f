"""Stage evaluate on a toy model: its reports, and what it refuses."""

import json
import math
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from harness_tasks import CHOICE, write_task
from toy_project import Project

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import MANIFEST, verify
from gptpipe.evaluate import evaluate
from gptpipe.evaluate.evaluate import documents_digest, evaluate_model
from gptpipe.formats.streams import open_stream
from gptpipe.score.continuations import load_generator
from gptpipe.score.scoring import Scoring, score
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
    evaluation = evaluate_model(
        project.root / "models/gpt", project.split, tmp_path, params.evaluate, params.seed
    )
    results = json.loads((tmp_path / "eval.json").read_bytes())
    assert results == evaluation.results
    assert set(results["val"]) == set(results["test"]) == METRICS
    trained = json.loads((project.root / "reports/train.json").read_bytes())
    assert results["val"]["loss"] == pytest.approx(trained["val"]["loss"], rel=1e-9)  # one definition of loss
    assert set(results["by_source"]["test"]) == {"text-0", "text-1"}
    parts = results["by_source"]["test"].values()
    assert sum(part["n_tokens"] for part in parts) == results["test"]["n_tokens"]
    nats = sum(part["loss"] * part["n_tokens"] for part in parts)
    assert nats / results["test"]["n_tokens"] == pytest.approx(results["test"]["loss"])
    assert results["test_digest"] == documents_digest(open_stream(project.split, "test"))
    positions = pd.read_csv(tmp_path / "eval.positions.csv")
    groups = ["0", "1", "2-3", "4-7", "8-15"]
    assert positions.groupby("split")["positions"].apply(list).to_dict() == {"test": groups, "val": groups}
    of_test = positions[positions["split"] == "test"]
    n_tokens, losses = of_test["n_tokens"], of_test["loss"]
    assert n_tokens.sum() == results["test"]["n_tokens"]
    assert (n_tokens * losses).sum() / n_tokens.sum() == pytest.approx(results["test"]["loss"])
    assert (of_test["loss_standard_error"] > 0).all()
    assert len(pd.read_csv(tmp_path / "eval.sources.csv")) == 4
    samples = (tmp_path / "samples.md").read_text()
    assert "**the **" in samples
    assert "--- real" in samples
    assert results["minimal_pairs"]["n_pairs"] > 0
    assert results["cloze"]["n_passages"] > 0
    assert results["memorization"] == {"share": None, "reason": "no generated document has 50 tokens"}
    documents = evaluation.documents[evaluation.documents["split"] == "test"]
    assert documents["nats"].sum() / documents["n_bytes"].sum() / math.log(2) == pytest.approx(
        results["test"]["bits_per_byte"]
    )
    verify(project.root / "models/gpt")  # the output of stage train is unchanged


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "in float32; a token attends to its own window only"),
        ({"train__document_masking": True}, "in float32; a token attends to its own document only"),
        ({"train__precision": "bfloat16"}, "in bfloat16; a token attends to its own window only"),
    ],
)
def test_a_model_is_scored_as_it_was_trained(
    toy_split: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """Training and evaluation give the same validation loss, and say how they scored."""
    project, params = Project(tmp_path, toy_split), tiny.params(model__architecture="llama", **changes)
    best = project.train(params)
    reports = project.root / "reports"
    evaluation = evaluate_model(project.root / "models/gpt", toy_split, reports, params.evaluate, params.seed)
    assert evaluation.results["val"]["loss"] == pytest.approx(best["loss"], rel=1e-9)
    model, tokenizer = load_generator(project.root / "models/gpt")
    scoring = Scoring.described(evaluation.results["scoring"], tokenizer.end_of_text)
    stream = open_stream(toy_split, "test")
    nats, _, n_tokens = score(model, stream, scoring).by_document
    assert evaluation.results["test"]["loss"] == pytest.approx(nats.sum() / n_tokens.sum(), rel=1e-9)
    others = {Scoring(), Scoring(end_of_text=tokenizer.end_of_text), Scoring(torch.bfloat16)} - {scoring}
    assert all(
        abs(score(model, stream, other).by_document[0].sum() / nats.sum() - 1) > 1e-6 for other in others
    )
    assert project.records[0].tagged["scoring"] == words
    assert words in unescape((project.root / "models/gpt/README.md").read_text())


def test_a_model_that_does_not_say_how_it_was_scored_is_refused(project: Project, tmp_path: Path) -> None:
    manifest = verify(project.root / "models/gpt")
    shutil.copytree(project.root / "models/gpt", tmp_path / "gpt")
    counts = {name: value for name, value in manifest.counts.items() if name != "scoring"}
    write_bytes(tmp_path / "gpt" / MANIFEST, manifest.model_copy(update={"counts": counts}).to_bytes())
    params = tiny.params()
    with pytest.raises(IntegrityError, match="does not say how the model was scored"):
        evaluate_model(tmp_path / "gpt", project.split, tmp_path / "reports", params.evaluate, params.seed)


def test_metrics_have_the_names_of_the_tracking_store(project: Project, tmp_path: Path) -> None:
    params = tiny.params()
    evaluation = evaluate_model(
        project.root / "models/gpt", project.split, tmp_path, params.evaluate, params.seed
    )
    metrics = evaluation.metrics()
    assert {f"{side}/{name}" for side in ("val", "test") for name in METRICS} <= set(metrics)
    assert {
        "test/xz_bits_per_byte",
        "test/ppmd_bits_per_byte",
        "val/unigram_bits_per_byte",
        "continuations/bleu",
    } <= set(metrics)
    assert {"minimal_pairs/accuracy", "cloze/accuracy_standard_error", "cloze/perplexity"} <= set(metrics)
    assert "memorization/share" not in metrics  # there is no run of 50 tokens in a context of 16
    assert all(math.isfinite(value) for value in metrics.values())


def test_tasks_are_run_and_reported(project: Project, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[harness]'")
    documents = [{"question": "the cat", "choices": ["sees", "likes"], "answer": i} for i in (0, 1, 1)]
    write_task(tmp_path / "tasks", CHOICE, documents)
    params = tiny.params(evaluate__tasks=("choice",), evaluate__task_folder=str(tmp_path / "tasks"))
    model = project.root / "models/gpt"
    evaluation = evaluate_model(model, project.split, tmp_path, params.evaluate, params.seed)
    accuracy = evaluation.results["tasks"]["choice"]["metrics"]["acc"]
    error = evaluation.results["tasks"]["choice"]["metrics"]["acc_standard_error"]
    assert accuracy in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert error == pytest.approx(1 / 3)  # of three documents: sqrt(2 / 9 * 3 / 2 / 3)
    assert evaluation.metrics()["task/choice/acc"] == accuracy
    assert evaluation.metrics()["task/choice/acc_standard_error"] == error
    digest = evaluation.results["tasks"]["choice"]["digest"]
    line = f"choice: acc {accuracy:.4f} ± {error:.4f} on 3 documents; digest {digest[:16]}"
    assert line in evaluation.summary()


def test_a_model_of_another_split_is_refused(project: Project, tmp_path: Path) -> None:
    other = tiny.make_split(tmp_path, n_documents=91)
    params = tiny.params()
    with pytest.raises(IntegrityError, match="was trained on another split"):
        evaluate_model(project.root / "models/gpt", other, tmp_path / "reports", params.evaluate, params.seed)
    assert not (tmp_path / "reports").exists()


def test_a_difference_to_transformers_ends_the_evaluation(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before reports are written, so that the stage does not reach the registry."""
    params = tiny.params(evaluate__check_transformers=True)
    arguments = (project.root / "models/gpt", project.split, tmp_path / "reports", params.evaluate, params.seed)

    def differs(*_: object) -> str:
        raise IntegrityError("models/gpt: transformers 9 computes other logits")

    monkeypatch.setattr(evaluate, "check_with_transformers", differs)
    with pytest.raises(IntegrityError, match="other logits"):
        evaluate_model(*arguments)
    assert not (tmp_path / "reports").exists()
    monkeypatch.setattr(evaluate, "check_with_transformers", lambda *_: "transformers 9 gives the same")
    assert evaluate_model(*arguments).summary()[-1] == "transformers 9 gives the same"
    monkeypatch.setattr(evaluate, "is_installed", lambda: False)
    assert len(evaluate_model(*arguments).summary()) == 2

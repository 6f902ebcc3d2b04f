"""The complete model card of a toy run, read as the Hugging Face hub reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from huggingface_hub import ModelCard
from toy_project import Project

from gptpipe.base.files import write_json
from gptpipe.base.manifest import verify
from gptpipe.collect.params import CollectParams
from gptpipe.commands.gguf_card import card_fields
from gptpipe.evaluate.evaluate import Evaluation, evaluate_model
from gptpipe.evaluate.model_card import write_model_card
from gptpipe.shell.errors import IntegrityError

OVERLAP = {
    "share": {"train": 0.1, "val": 0.0, "test": 0.2, "task-blimp": 0.5},
    "benchmarks": {"task-blimp": "task blimp"},
    **{f"{group}_contaminated": n for group, n in [("val", 0), ("test", 2), ("task-blimp", 1)]},
    **{f"{group}_examined": n for group, n in [("val", 9), ("test", 10), ("task-blimp", 2)]},
}
SOURCES = [
    {"kind": "python-docs"},
    {"kind": "python-code", "package": "numpy"},
    {"kind": "text", "paths": ["data/sources/[a].txt"], "license": "CC-BY-4.0"},
    {"kind": "huggingface", "dataset": "owner/texts", "revision": "0" * 40, "license": "odc-by"},
]
TASK = {
    "metrics": {"acc": 0.625, "acc_standard_error": 0.125},
    "n_documents": 16,
    "n_examples": 2,
    "is_part": False,
    "digest": "d" * 64,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, toy_split: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("project"), toy_split)
    project.train(tiny.params())
    return project


@pytest.fixture(scope="module")
def evaluation(project: Project) -> Evaluation:
    params = tiny.params()
    reports = project.root / "reports"
    evaluation = evaluate_model(
        project.root / "models/gpt", project.split, reports, params.evaluate, params.seed
    )
    evaluation.results["tasks"] = {"blimp": TASK, "blimp_part": TASK | {"is_part": True}}
    return evaluation


@pytest.fixture
def card(project: Project, evaluation: Evaluation, params: Any) -> str:
    sources = CollectParams.model_validate_json(
        json.dumps(params.collect.model_dump(mode="json") | {"sources": SOURCES})
    ).sources
    write_json(project.root / "reports/split.json", OVERLAP)
    cost = ["Duration: 0.50 hours.", "Energy: not measured."]
    return write_model_card(project.root / "reports", project.root / "models/gpt", sources, evaluation, cost)


def test_the_hub_reads_the_results_of_the_card(card: str, evaluation: Evaluation) -> None:
    data = ModelCard(card).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["owner/texts"]
    assert data.model_name == "gpt"
    results = {(result.dataset_name, result.metric_type): result for result in data.eval_results}
    bits = results["test documents", "bits_per_byte"]
    test = evaluation.results["test"]
    assert bits.metric_value == test["bits_per_byte"]
    assert bits.metric_args == {"standard_error": test["bits_per_byte_standard_error"]}
    assert bits.dataset_revision == evaluation.results["test_digest"]
    assert results["val documents", "loss"].metric_value == evaluation.results["val"]["loss"]
    assert results["cloze", "perplexity"].metric_value == evaluation.results["cloze"]["perplexity"]
    assert ("memorization", "share") not in results  # not measured: the context is too short
    task = results["blimp", "acc"]
    assert (task.metric_value, task.metric_args) == (0.625, {"standard_error": 0.125})
    assert task.dataset_revision == "d" * 64
    assert ("blimp_part", "acc") not in results


def test_the_card_says_what_the_record_knows(card: str, project: Project, evaluation: Evaluation) -> None:
    trained = (project.root / "models/gpt/README.md").read_text()
    assert trained.split("---\n", 2)[2] in card  # the whole card of stage train
    verify(project.root / "models/gpt")  # which is unchanged
    assert (project.root / "reports/model_card.md").read_text() == card
    for line in (
        "| python-docs | PSF-2.0 |",
        "| python-code numpy | not stated |",
        "| text data/sources/&#91;a&#93;.txt | CC-BY-4.0 |",
        "| huggingface owner/texts train | odc-by |",
        "val 0 of 9 examined; test 2 of 10 examined; task blimp 1 of 2 examined.",
        "Duration: 0.50 hours.",
        "Energy: not measured.",
        "It follows no instructions",
        "| blimp: acc | 0.6250 ± 0.1250 | 16 documents, 2 examples before each; digest dddddddddddddddd |",
        "| memorization: share of runs of 50 tokens | not measured | no generated document has 50 tokens |",
    ):
        assert line in card
    results = evaluation.results
    assert f"{results['test']['loss']:.4f} ± {results['test']['loss_standard_error']:.4f}" in card
    accuracy, error = (results["cloze"][name] for name in ("accuracy", "accuracy_standard_error"))
    passages = f"{results['cloze']['n_passages']} passages"
    assert f"| last words: accuracy | {accuracy:.4f} ± {error:.4f} | {passages}" in card


def test_an_exported_file_names_the_data_of_the_card(card: str, project: Project) -> None:
    fields = card_fields(project.root / "models/gpt")
    assert fields["general.name"] == "gpt"
    assert fields["general.description"].startswith("A qwen3 language model with ")
    assert fields["general.description"].endswith("trained from scratch by gptpipe.")
    assert fields["general.tags"] == ["gptpipe", "qwen3", "text-generation"]
    assert fields["general.dataset.count"] == 4
    assert fields["general.dataset.2.name"] == "text data/sources/[a].txt"
    assert fields["general.dataset.2.description"] == "licence: CC-BY-4.0"
    licenses = "of the training data: CC-BY-4.0, PSF-2.0, odc-by, not stated"
    assert fields["general.license.name"] == licenses


def test_the_card_of_another_model_says_nothing_about_the_data(card: str, project: Project) -> None:
    path = project.root / "reports/model_card.md"
    path.write_text(card.replace("- Training:", "- Another training:"))
    assert "general.dataset.count" not in card_fields(project.root / "models/gpt")
    path.write_text(card.replace("model-index:", "model-index: ]"))
    assert card_fields(project.root / "models/gpt") == {}


def test_a_missing_or_other_overlap_report_is_an_error(
    card: str, project: Project, evaluation: Evaluation
) -> None:
    path = project.root / "reports/split.json"
    for content in ("", "[]", '{"share": {"val": 1}}'):
        path.write_text(content)
        with pytest.raises(IntegrityError, match=r"split\.json: not as stage split wrote it"):
            write_model_card(project.root / "reports", project.root / "models/gpt", [], evaluation, [])

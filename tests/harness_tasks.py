"""Tasks for lm-evaluation-harness that tests make in a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FILES = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
}
CHOICE: dict[str, Any] = {
    "task": "choice",
    **_FILES,
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ROLLING: dict[str, Any] = {
    "task": "rolling",
    **_FILES,
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "bits_per_byte"}],
}
GENERATE: dict[str, Any] = {
    "task": "generate",
    **_FILES,
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}


def write_task(folder: Path, task: dict[str, Any], documents: Sequence[dict[str, Any]]) -> Path:
    """Write a task and its documents; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(document) + "\n" for document in documents]
    (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / f"{task['task']}.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")
    return path

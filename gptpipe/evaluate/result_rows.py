"""The results of built-in evaluations and of tasks as rows, for the report, the model card and the record."""

from collections.abc import Iterator
from typing import Any, NamedTuple

_BUILT_IN = {  # section and metric of reports/eval.json -> the name on pages
    ("minimal_pairs", "accuracy"): "minimal pairs: accuracy",
    ("cloze", "accuracy"): "last words: accuracy",
    ("cloze", "perplexity"): "last words: perplexity per word",
    ("memorization", "share"): "memorization: share of runs of 50 tokens",
}
_WHOLES = ("n_documents", "n_texts")  # which contain what is counted before them


class ResultRow(NamedTuple):
    """One result, or the reason why there is none."""

    key: str  # in the tracking store
    label: str
    value: float | None
    standard_error: float | None
    note: str  # on how many items it is based, or why it is missing

    def __str__(self) -> str:
        if self.value is None:
            return "not measured"
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.value:.4f}{error}"


def result_rows(results: dict[str, Any]) -> list[ResultRow]:
    """A row for each metric; `results` is the content of reports/eval.json.

    Of a group of tasks, the row of the group stands for its tasks.
    """
    tasks = results.get("tasks", {}).items()
    return [
        *_built_in_rows(results),
        *(row for name, task in tasks if not task["is_part"] for row in _task_rows(name, task)),
    ]


def _task_rows(name: str, task: dict[str, Any]) -> Iterator[ResultRow]:
    examples = f", {task['n_examples']} examples before each" if task["n_examples"] else ""
    note = f"{task['n_documents']:,} documents{examples}; digest {task['digest'][:16]}"
    metrics = task["metrics"]
    for metric, value in metrics.items():
        if not metric.endswith("_standard_error"):
            error = metrics.get(f"{metric}_standard_error")
            yield ResultRow(f"task/{name}/{metric}", f"{name}: {metric}", value, error, note)


def _built_in_rows(results: dict[str, Any]) -> list[ResultRow]:
    return [
        ResultRow(
            f"{section}/{metric}",
            label,
            results[section][metric],
            results[section].get(f"{metric}_standard_error"),
            results[section].get("reason") or _basis(results[section]),
        )
        for (section, metric), label in _BUILT_IN.items()
        if section in results
    ]


def _basis(values: dict[str, Any]) -> str:
    """What a built-in evaluation is based on, such as `256 pairs of 200 documents`."""
    names = sorted((name for name in values if name.startswith("n_")), key=_WHOLES.__contains__)
    counts = [f"{values[name]:,} {name.removeprefix('n_')}" for name in names]
    reference = values.get("share_of_held_out")
    of_held_out = "" if reference is None else f"; of the held-out text {reference:.4f}"
    return " of ".join(counts) + of_held_out

"""The results of built-in evaluations and of tasks as rows, for the report, the model card and the record."""

from typing import Any, NamedTuple

_BUILT_IN = {  # section and metric of reports/eval.json -> the name on pages
    ("minimal_pairs", "accuracy"): "minimal pairs: accuracy",
    ("cloze", "accuracy"): "last words: accuracy",
    ("cloze", "perplexity"): "last words: perplexity per word",
    ("memorization", "share"): "memorization: share of runs of 50 tokens",
}


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
    """A row for each metric; `results` is the content of reports/eval.json."""
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
    counts = [f"{n:,} {name.removeprefix('n_')}" for name, n in values.items() if name.startswith("n_")]
    reference = values.get("share_of_held_out")
    of_held_out = "" if reference is None else f"; of the held-out text {reference:.4f}"
    return " of ".join(counts) + of_held_out

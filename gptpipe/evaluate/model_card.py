"""The complete model card, reports/model_card.md: the card that stage train wrote, and what evaluate knows.

models/gpt/README.md is an output of train, which evaluate must not change. So the complete card is a report. It
is also the description of the registered version. Its header has the format of the Hugging Face hub, with the
results as a `model-index`.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ruamel.yaml import YAML

from gptpipe.base.files import write_bytes
from gptpipe.base.pages import render_markdown
from gptpipe.evaluate.evaluate import Evaluation
from gptpipe.evaluate.result_rows import result_rows
from gptpipe.shell.errors import IntegrityError

_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"
_FENCE = "---\n"  # around the header
_HELD_OUT_METRICS = ("loss", "perplexity", "bits_per_byte", "bits_per_byte_overlapping", "token_accuracy")


class DataSource(Protocol):
    """What the card says about a source of `collect.sources`."""

    @property
    def description(self) -> str: ...

    @property
    def stated_license(self) -> str | None: ...

    @property
    def hub_dataset(self) -> str | None: ...


def write_model_card(
    reports: Path, model: Path, sources: Sequence[DataSource], evaluation: Evaluation, cost: Sequence[str]
) -> str:
    """Write the card and return it; `cost` are sentences about duration and energy. Raises IntegrityError."""
    trained = (model / "README.md").read_text(encoding="utf-8")
    _, header, body = trained.split(_FENCE, 2)
    results = evaluation.results
    page = render_markdown(
        _TEMPLATE,
        card=body,
        results=results,
        sides=[side for side in ("val", "test") if side in results],
        rows=result_rows(results),
        sources=sources,
        split=evaluation.split.counts,
        overlap=_overlap(reports / "split.json"),
        cost=cost,
    )
    card = f"{_FENCE}{_header(header, sources, results)}{_FENCE}{page}"
    write_bytes(reports / "model_card.md", card.encode())
    return card


def _header(trained: str, sources: Sequence[DataSource], results: dict[str, Any]) -> str:
    """The lines of the trained model's header, and those about data sets and results.

    The hub ignores `training_data`, which `gptpipe export` reads: the sources as in the table of the card.
    """
    datasets = sorted({source.hub_dataset for source in sources if source.hub_dataset})
    header: dict[str, Any] = {"datasets": datasets} if datasets else {}
    header["training_data"] = [
        {"name": source.description, "license": source.stated_license or "not stated"} for source in sources
    ]
    header["model-index"] = [{"name": "gpt", "results": list(_index(results))}]
    text = io.StringIO()
    YAML(typ="safe").dump(json.loads(json.dumps(header)), text)
    return trained + text.getvalue()


def _index(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The results as entries of a `model-index`: one for each held-out side, and one for each evaluation."""
    entries = []
    for side in ("val", "test"):
        if side in results:
            values = results[side]
            metrics = [
                _metric(name, values[name], values[f"{name}_standard_error"]) for name in _HELD_OUT_METRICS
            ]
            digest = {"revision": results["test_digest"]} if side == "test" else {}
            dataset = {"name": f"{side} documents", "type": "held-out", "split": side, **digest}
            entries.append(_entry(dataset, metrics))
    for row in result_rows(results):
        if row.value is not None:
            section, _, rest = row.key.partition("/")
            name, _, metric = rest.rpartition("/")
            dataset = {"name": name or section.replace("_", " "), "type": section}
            if section == "task":
                dataset["revision"] = results["tasks"][name]["digest"]
            entries.append(_entry(dataset, [_metric(metric, row.value, row.standard_error)]))
    return entries


def _entry(dataset: dict[str, str], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def _metric(name: str, value: float, error: float | None) -> dict[str, Any]:
    args = {} if error is None else {"args": {"standard_error": error}}
    return {"type": name, "value": value, "name": name.replace("_", " "), **args}


def _overlap(path: Path) -> list[tuple[str, int, int]]:
    """Name, contaminated and examined documents of each held-out group. Raises IntegrityError."""
    try:
        report = json.loads(path.read_bytes())
        names = report.get("benchmarks", {})
        return [
            (names.get(group, group), report[f"{group}_contaminated"], report[f"{group}_examined"])
            for group in ("val", "test", *names)
            if group in report["share"]
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: not as stage split wrote it; run `dvc repro -f split`") from error

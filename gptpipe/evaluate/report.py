"""reports/report.html: one page that works offline, with charts of the training and of the evaluation."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import MANIFEST, Manifest, verify
from gptpipe.base.pages import render_html
from gptpipe.base.params import Section
from gptpipe.evaluate.champion import Comparison
from gptpipe.evaluate.charts import Line, bar_chart, error_bar_chart, line_chart
from gptpipe.evaluate.comparable_runs import Comparable
from gptpipe.evaluate.result_rows import result_rows
from gptpipe.record.store import RUN_FILE, read_run_id, read_training_seconds
from gptpipe.score.scoring import scoring_in_words
from gptpipe.shell.errors import IntegrityError

_TEMPLATE = Path(__file__).with_name("templates") / "report.html.jinja"


@dataclass(frozen=True)
class TrainingReports:
    """The content of the reports that stage train wrote."""

    summary: dict[str, Any]
    samples: list[tuple[int, str, str]]  # step, prompt, continuation
    steps: pd.DataFrame
    validations: pd.DataFrame
    run_id: str
    seconds: float  # of all steps

    def losses(self) -> dict[str, Line]:
        """The curves of the loss, in nats per token over steps."""
        return {
            "train": _line(self.steps, "step", "loss"),
            "val": _line(self.validations, "step", "val_loss"),
        }


def read_training_reports(reports: Path, model: Path) -> TrainingReports:
    """Read the reports of stage train and check each SHA-256 against the model's manifest.

    Raises IntegrityError.
    """
    digests = verify(model).counts.get("reports")
    if not isinstance(digests, dict):
        raise IntegrityError(
            f"{model / MANIFEST}: it does not list the reports of its training; run `dvc repro`"
        )
    contents: dict[str, bytes] = {}
    for name in ("train.json", "train.samples.json", "train.steps.csv", "train.validations.csv"):
        path = reports / name
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; `dvc repro` restores it") from error
        if hashlib.sha256(contents[name]).hexdigest() != digests.get(name):
            raise IntegrityError(
                f"{path}: not as stage train wrote it; `dvc repro` restores it, "
                "or `dvc repro -f train` if DVC's cache is damaged too"
            )
    return TrainingReports(
        summary=json.loads(contents["train.json"]),
        samples=json.loads(contents["train.samples.json"])["data"],
        steps=pd.read_csv(io.BytesIO(contents["train.steps.csv"])),
        validations=pd.read_csv(io.BytesIO(contents["train.validations.csv"])),
        run_id=read_run_id(reports / RUN_FILE),
        seconds=read_training_seconds(reports / RUN_FILE),
    )


def draw_charts(reports: Path, training: TrainingReports, comparable: Comparable) -> dict[str, str]:
    """Title -> SVG, from the reports of stage train and the tables that stage evaluate wrote to `reports`."""
    positions, sources, calibration, lengths = (
        pd.read_csv(reports / f"eval.{name}.csv") for name in ("positions", "sources", "calibration", "lengths")
    )
    steps = training.steps
    learning_rate = {"lr": _line(steps, "step", "lr")}
    gradient_norm = {"norm": _line(steps, "step", "grad_norm")}
    bits_by_source = {
        f"{row['source']}, {row['split']}": row["bits_per_byte"] for row in sources.to_dict("records")
    }
    accuracy_by_confidence = _line_per_split(calibration, "confidence", "accuracy")
    share_by_length = _line_per_split(lengths, "n_tokens", "share")
    return {
        "Loss": line_chart("step", "nats per token", training.losses(), band=_band(comparable)),
        "Learning rate": line_chart("step", "learning rate", learning_rate),
        "Gradient norm": line_chart("step", "norm before clipping", gradient_norm),
        "Loss by position": _by_position(positions, "loss", "nats per token"),
        "Accuracy by position": _by_position(positions, "token_accuracy", "token accuracy"),
        "Bits per byte by source": bar_chart("bits per byte", bits_by_source),
        "Calibration": line_chart("confidence", "accuracy", accuracy_by_confidence, diagonal=True),
        "Length of documents": line_chart("tokens, up to", "share of documents", share_by_length, log_x=True),
    }


def _band(comparable: Comparable) -> tuple[str, Line, Sequence[float]] | None:
    if not comparable.steps:
        return None
    return "val, other runs", (comparable.steps, comparable.lowest), comparable.highest


def _line(table: pd.DataFrame, x: str, y: str) -> Line:
    return table[x].tolist(), table[y].tolist()


def _line_per_split(table: pd.DataFrame, x: str, y: str) -> dict[str, Line]:
    return {str(split): _line(rows, x, y) for split, rows in table.groupby("split", sort=False)}


def _by_position(table: pd.DataFrame, name: str, label: str) -> str:
    """The chart of a metric by groups of positions."""
    table = table.astype({"positions": str})  # of a short context, they are read as numbers
    labels = list(dict.fromkeys(table["positions"]))
    series = {
        str(split): (rows["positions"].tolist(), _line(rows, name, f"{name}_standard_error"))
        for split, rows in table.groupby("split", sort=False)
    }
    return error_bar_chart("position in the window", label, labels, series)


def write_report(
    reports: Path,
    training: TrainingReports,
    params: Section,
    split: Manifest,
    collected: dict[str, Any],
    charts: dict[str, str],
    comparison: Comparison,
    comparable: Comparable,
) -> str:
    """Write report.html and return it.

    `split` is the manifest of the split, `collected` the counts of stage collect, `charts` is title -> SVG,
    `comparison` that with the champion, `comparable` the range of comparable runs.
    """
    results = json.loads((reports / "eval.json").read_bytes())
    page = render_html(
        _TEMPLATE,
        results=results,
        rows=result_rows(results),
        trained=training.summary,
        scoring=scoring_in_words(results["scoring"]),
        samples=training.samples,
        sides=[side for side in ("test", "val") if side in results],
        charts=charts,
        champion=comparison,
        comparable=comparable,
        after=unescape((reports / "samples.md").read_text(encoding="utf-8")),
        params=params.model_dump(mode="json"),
        collected=collected,
        split=split.counts,
        ancestors=sorted(split.lineage("split").items()),
        run_id=training.run_id,
    )
    write_bytes(reports / "report.html", page.encode())
    return page

"""What evaluation writes for people, from `templates/`: samples, model card, and report.html, which fetches nothing."""

import hashlib
import io
import json
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import MANIFEST, Manifest, verify
from gptpipe.base.pages import render_html
from gptpipe.base.params import Section
from gptpipe.evaluate import charts
from gptpipe.shell.errors import IntegrityError

_TEMPLATE = Path(__file__).with_name("templates") / "report.html.jinja"


@dataclass(frozen=True)
class TrainingReports:
    """What stage train wrote to `reports`."""

    summary: dict[str, Any]
    samples: list[tuple[int, str, str]]  # step, prompt, continuation
    steps: pd.DataFrame
    validations: pd.DataFrame


def read_training_reports(reports: Path, model: Path) -> TrainingReports:
    """The reports of stage train, each compared with its SHA-256 in the model's manifest. Raises IntegrityError."""
    digests = verify(model).counts.get("reports")
    if not isinstance(digests, dict):
        raise IntegrityError(f"{model / MANIFEST}: it does not name the reports of its training; run `dvc repro`")
    contents: dict[str, bytes] = {}
    for name in ("train.json", "train.samples.json", "train.steps.csv", "train.validations.csv"):
        path = reports / name
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; `dvc repro` restores it") from error
        if hashlib.sha256(contents[name]).hexdigest() != digests.get(name):
            raise IntegrityError(
                f"{path}: not as stage train wrote it; `dvc repro` restores it, or `dvc repro -f train` if DVC's cache "
                "has the same damage"
            )
    return TrainingReports(
        summary=json.loads(contents["train.json"]),
        samples=json.loads(contents["train.samples.json"])["data"],
        steps=pd.read_csv(io.BytesIO(contents["train.steps.csv"])),
        validations=pd.read_csv(io.BytesIO(contents["train.validations.csv"])),
    )


def draw_figures(reports: Path, trained: TrainingReports) -> dict[str, str]:
    """Title -> SVG, from the reports of stage train and the tables that evaluate wrote to `reports`."""
    names = ("eval.positions", "eval.sources", "eval.calibration", "eval.lengths")
    positions, sources, calibration, lengths = (pd.read_csv(reports / f"{name}.csv") for name in names)

    def by_split(table: pd.DataFrame, x: str, y: str) -> dict[str, charts.Line]:
        return {str(split): (rows[x].tolist(), rows[y].tolist()) for split, rows in table.groupby("split", sort=False)}

    def by_step(table: pd.DataFrame, y: str) -> charts.Line:
        return table["step"].tolist(), table[y].tolist()

    loss = {"train": by_step(trained.steps, "loss"), "val": by_step(trained.validations, "val_loss")}
    held_out = {f"{row['source']}, {row['split']}": row["bits_per_byte"] for row in sources.to_dict("records")}
    by_position, sure = by_split(positions, "position", "loss"), by_split(calibration, "confidence", "accuracy")
    right = by_split(positions, "position", "token_accuracy")
    length = by_split(lengths, "n_tokens", "share")
    return {
        "Loss": charts.lines("step", "nats per token", loss),
        "Learning rate": charts.lines("step", "learning rate", {"lr": by_step(trained.steps, "lr")}),
        "Gradient norm": charts.lines("step", "norm before clipping", {"norm": by_step(trained.steps, "grad_norm")}),
        "Loss by position": charts.lines("position", "nats per token", by_position),
        "Accuracy by position": charts.lines("position", "token accuracy", right),
        "Bits per byte by source": charts.bars("bits per byte", held_out),
        "Calibration": charts.lines("confidence", "accuracy", sure, diagonal=True),
        "Length of documents": charts.lines("tokens, up to", "share of documents", length, log_x=True),
    }


def write_page(
    reports: Path,
    trained: TrainingReports,
    params: Section,
    lineage: Manifest,
    collected: dict[str, Any],
    run_id: str,
    figures: dict[str, str],
) -> str:
    """Write report.html and return it; `lineage` is the split's manifest, `collected` the counts of stage collect."""
    results = json.loads((reports / "eval.json").read_bytes())
    page = render_html(
        _TEMPLATE,
        results=results,
        trained=trained.summary,
        samples=trained.samples,
        sides=[side for side in ("test", "val") if side in results],
        figures=figures,
        after=unescape((reports / "samples.md").read_text(encoding="utf-8")),
        params=params.model_dump(mode="json"),
        collected=collected,
        split=lineage.counts,
        ancestors=sorted(lineage.lineage("split").items()),
        run_id=run_id,
    )
    write_bytes(reports / "report.html", page.encode())
    return page

"""What evaluation writes for people, from `templates/`: samples, model card, and report.html, which fetches nothing."""

import json
from html import unescape
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from gptpipe.config import Params
from gptpipe.evaluation import charts
from gptpipe.files import Manifest, write_bytes

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def draw_figures(reports: Path) -> dict[str, str]:
    """Title -> SVG, from the tables that train and evaluate left in `reports`."""
    names = ("train.steps", "train.validations", "eval.positions", "eval.sources", "eval.calibration", "eval.lengths")
    steps, validations, positions, sources, calibration, lengths = (pd.read_csv(reports / f"{n}.csv") for n in names)

    def by_split(table: pd.DataFrame, x: str, y: str) -> dict[str, charts.Line]:
        return {str(split): (rows[x].tolist(), rows[y].tolist()) for split, rows in table.groupby("split", sort=False)}

    def by_step(table: pd.DataFrame, y: str) -> charts.Line:
        return table["step"].tolist(), table[y].tolist()

    loss = {"train": by_step(steps, "loss"), "val": by_step(validations, "val_loss")}
    held_out = {f"{row['source']}, {row['split']}": row["bits_per_byte"] for row in sources.to_dict("records")}
    by_position, sure = by_split(positions, "position", "loss"), by_split(calibration, "confidence", "accuracy")
    right = by_split(positions, "position", "token_accuracy")
    length = by_split(lengths, "n_tokens", "share")
    return {
        "Loss": charts.lines("step", "nats per token", loss),
        "Learning rate": charts.lines("step", "learning rate", {"lr": by_step(steps, "lr")}),
        "Gradient norm": charts.lines("step", "norm before clipping", {"norm": by_step(steps, "grad_norm")}),
        "Loss by position": charts.lines("position", "nats per token", by_position),
        "Accuracy by position": charts.lines("position", "token accuracy", right),
        "Bits per byte by source": charts.bars("bits per byte", held_out),
        "Calibration": charts.lines("confidence", "accuracy", sure, diagonal=True),
        "Length of documents": charts.lines("tokens, up to", "share of documents", length, log_x=True),
    }


def write_page(reports: Path, params: Params, lineage: Manifest, collected: dict[str, Any], run_id: str,
               figures: dict[str, str]) -> str:  # fmt: skip
    """Write report.html and return it; `lineage` is the split's manifest, `collected` the counts of stage collect."""
    results, trained, samples = (
        json.loads((reports / f"{name}.json").read_bytes()) for name in ("eval", "train", "train.samples")
    )
    page = TEMPLATES.get_template("report.html").render(
        results=results,
        trained=trained,
        samples=samples["data"],
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

"""reports/report.html: a run on one page that can be mailed; it fetches nothing from anywhere."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from gptpipe.config import Params
from gptpipe.evaluation import charts
from gptpipe.files import Manifest, write_bytes

_TEMPLATE = Path(__file__).with_name("report.html")


def draw_figures(reports: Path) -> dict[str, str]:
    """Title -> SVG, from the tables that train and evaluate left in `reports`."""

    def read(name: str) -> pd.DataFrame:
        return pd.read_csv(reports / f"{name}.csv")

    def by_split(table: pd.DataFrame, x: str, y: str) -> dict[str, charts.Line]:
        return {str(split): (rows[x].tolist(), rows[y].tolist()) for split, rows in table.groupby("split", sort=False)}

    steps, validations = read("train.steps"), read("train.validations")
    positions, sources = read("eval.positions"), read("eval.sources")
    step = steps["step"].tolist()
    training = (step, steps["loss"].tolist())
    validation = (validations["step"].tolist(), validations["val_loss"].tolist())
    held_out = {f"{row['source']}, {row['split']}": row["bits_per_byte"] for row in sources.to_dict("records")}
    return {
        "Loss": charts.lines("step", "nats per token", {"train": training, "val": validation}),
        "Learning rate": charts.lines("step", "learning rate", {"lr": (step, steps["lr"].tolist())}),
        "Gradient norm": charts.lines("step", "norm before clipping", {"norm": (step, steps["grad_norm"].tolist())}),
        "Loss by position": charts.lines("position", "nats per token", by_split(positions, "position", "loss")),
        "Accuracy by position": charts.lines(
            "position", "token accuracy", by_split(positions, "position", "token_accuracy")
        ),
        "Bits per byte by source": charts.bars("bits per byte", held_out),
        "Calibration": charts.lines(
            "confidence", "accuracy", by_split(read("eval.calibration"), "confidence", "accuracy"), diagonal=True
        ),
        "Length of documents": charts.lines(
            "tokens, up to", "share of documents", by_split(read("eval.lengths"), "n_tokens", "share"), log_x=True
        ),
    }


def write_page(
    reports: Path,
    figures: dict[str, str],
    params: Params,
    lineage: Manifest,
    collected: dict[str, Any],
    run_id: str | None,
) -> str:
    """Write the page and return it; `lineage` is the split's manifest, `collected` the counts of stage collect."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    results, trained = (json.loads((reports / f"{name}.json").read_bytes()) for name in ("eval", "train"))
    sides = [side for side in ("test", "val") if side in results]
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        trained=trained,
        sides=sides,
        figures=figures,
        samples=json.loads((reports / "train.samples.json").read_bytes()),
        after=(reports / "samples.md").read_text(encoding="utf-8"),
        params=params.model_dump(mode="json"),
        collected=collected,
        split=lineage.counts,
        ancestors=sorted(lineage.lineage("split").items()),
        run_id=run_id,
    )
    write_bytes(reports / "report.html", page.encode())
    return page

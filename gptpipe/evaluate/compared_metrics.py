"""reports/metrics.json: what DVC compares runs by, ten values at most.

All other metrics are in reports/eval.json and in the tracking store. `dvc exp show` has a column for each
value, so the names are short: bpb is bits per byte, se its standard error, ppl perplexity, acc token accuracy.
"""

from pathlib import Path
from typing import Any

from gptpipe.base.files import write_json
from gptpipe.evaluate.report import TrainingReports
from gptpipe.formats.overlaps import read_overlaps

_ID_DIGITS = 8  # of a run id; `gptpipe restore` and `gptpipe compare` take them


def write_compared_metrics(reports: Path, results: dict[str, Any], training: TrainingReports) -> None:
    """Write metrics.json from the content of eval.json, from the reports of the training, and from split.json.

    Of the validation split it has the two values by which models are chosen, of the test split the others;
    without a test split, all are of the validation split. Raises IntegrityError.
    """
    side = "test" if "test" in results else "val"
    of_side = results[side]
    metrics: dict[str, Any] = {"val_bpb": results["val"]["bits_per_byte"], "val_loss": results["val"]["loss"]}
    metrics |= {
        f"{side}_bpb": of_side["bits_per_byte"],
        f"{side}_bpb_se": of_side["bits_per_byte_standard_error"],
        f"{side}_ppl": of_side["perplexity"],
        f"{side}_acc": of_side["token_accuracy"],
    }
    overlap = read_overlaps(reports / "split.json").get(side)
    if overlap is not None and overlap.share is not None:
        metrics["overlap"] = overlap.share
    metrics["tokens"] = training.summary["tokens"]
    metrics["seconds"] = round(training.seconds, 1)
    metrics["run"] = training.run_id[:_ID_DIGITS]
    write_json(reports / "metrics.json", metrics)

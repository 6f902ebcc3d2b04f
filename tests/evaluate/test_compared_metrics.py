"""reports/metrics.json: the few values that DVC compares."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gptpipe.base.files import write_json
from gptpipe.evaluate.compared_metrics import write_compared_metrics
from gptpipe.evaluate.report import TrainingReports

RUN = "0123456789abcdef" * 2


def side(value: float) -> dict[str, float]:
    return {
        "bits_per_byte": value,
        "bits_per_byte_standard_error": value / 100,
        "loss": 2 * value,
        "perplexity": 10 * value,
        "token_accuracy": value / 10,
        "calibration_error": 0.5,
    }


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """A folder with what stage split has written."""
    overlaps = {"share": {"train": 0.5, "val": 0.25, "test": 0.125}, "val_examined": 8, "test_examined": 16}
    write_json(tmp_path / "split.json", overlaps)
    return tmp_path


def written(reports: Path, results: dict[str, Any]) -> dict[str, Any]:
    training = TrainingReports({"tokens": 1000}, [], pd.DataFrame(), pd.DataFrame(), RUN, seconds=12.345)
    write_compared_metrics(reports, results, training)
    metrics: dict[str, Any] = json.loads((reports / "metrics.json").read_bytes())
    return metrics


def test_ten_values_of_both_splits(reports: Path) -> None:
    assert written(reports, {"val": side(2.0), "test": side(3.0)}) == {
        "val_bpb": 2.0,
        "val_loss": 4.0,
        "test_bpb": 3.0,
        "test_bpb_se": 0.03,
        "test_ppl": 30.0,
        "test_acc": 0.3,
        "overlap": 0.125,
        "tokens": 1000,
        "seconds": 12.3,
        "run": "01234567",
    }


def test_a_table_of_these_values_fits_a_terminal_of_160_columns(reports: Path) -> None:
    """`dvc exp show` without folders, date, executor and tokens, for a sweep of two parameters.

    Each column is as wide as its name or its values, and has three spaces. DVC shows five significant digits:
    `0.026588` has 8 characters. The overlap is the same in all experiments. Before the first column there are
    two spaces, after the last none more.
    """
    metrics = set(written(reports, {"val": side(2.0), "test": side(3.0)})) - {"tokens", "overlap"}
    names = ["  ├── 7f642fc [hated-flea]", "Success", *metrics, "train.lr", "train.max_steps"]
    assert sum(max(len(name), 8) + 3 for name in names) <= 160


def test_without_a_test_split_all_values_are_of_the_validation_split(reports: Path) -> None:
    metrics = written(reports, {"val": side(2.0)})
    assert (metrics["val_bpb_se"], metrics["val_acc"], metrics["overlap"]) == (0.02, 0.2, 0.25)
    assert not [name for name in metrics if name.startswith("test")]
    assert len(metrics) == 9


def test_an_unknown_overlap_is_left_out(reports: Path) -> None:
    write_json(reports / "split.json", {"share": {"test": None}, "test_examined": 0})
    assert "overlap" not in written(reports, {"val": side(2.0), "test": side(3.0)})

"""`gptpipe compare` over runs whose figures are known, against statistics done by hand."""

import re
from pathlib import Path

import mlflow
import pytest
from scipy.stats import ttest_ind

from gptpipe.commands.compare import _draw, compare
from gptpipe.record.store import connect
from gptpipe.shell.errors import ConfigError, InputError

pytestmark = pytest.mark.usefixtures("project")


def log(lr: str, seed: int, value: float, metric: str = "test/bits_per_byte", error: bool = True, **tags: str) -> str:
    client = connect()
    experiment = client.get_experiment_by_name("gptpipe")
    assert experiment is not None
    run_id = client.create_run(experiment.experiment_id, tags={"params_digest": f"{lr} {seed}", **tags}).info.run_id
    for key, text in (("train.lr", lr), ("seed", str(seed)), ("train.schedule", "linear")):
        client.log_param(run_id, key, text)
    client.log_metric(run_id, metric, value)
    if error:
        client.log_metric(run_id, f"{metric}_standard_error", 0.05)
    return str(run_id)


def rows(*names: str, metric: str = "test/bits_per_byte") -> list[list[str]]:
    """Cells that hold anything, the header first."""
    return [re.split(r"\s{2,}", line.strip()) for line in compare(names, metric).splitlines()]


def test_groups_over_seeds() -> None:
    for seed, (good, bad) in enumerate([(1.50, 1.60), (1.52, 1.70), (1.54, 1.65)]):
        log("0.001", seed, good)
        log("0.01", seed, bad)
    log("0.01", 2, 1.65)  # repeated: the same seed is no new evidence
    log("0.1", 0, 2.0)
    p = ttest_ind([1.50, 1.52, 1.54], [1.60, 1.70, 1.65], equal_var=False).pvalue
    assert rows() == [
        ["runs", "test/bits_per_byte", "standard error", "p against best"],
        ["train.lr=0.001", "best", "3", "1.5200", f"{0.02 / 3**0.5:.4f}"],
        ["train.lr=0.01", "3", "1.6500", f"{0.05 / 3**0.5:.4f}", f"{p:.4f}"],
        ["train.lr=0.1", "1", "2.0000", "0.0500"],  # a single seed: over documents, and no significance
    ]


def test_more_is_better_where_it_is() -> None:
    log("0.1", 0, 0.2, "test/token_accuracy")
    log("0.2", 0, 0.3, "test/token_accuracy")
    assert [row[:2] for row in rows(metric="test/token_accuracy")[1:]] == [
        ["train.lr=0.2", "best"],
        ["train.lr=0.1", "1"],
    ]


def test_a_figure_without_a_standard_error_of_its_own() -> None:
    """Of a single seed none is known; this was a traceback."""
    for seed, lr in enumerate(["0.1", "0.1", "0.2"]):
        log(lr, seed, 2.0 + seed, "train/loss", error=False)
    assert [row[:4] for row in rows(metric="train/loss")[1:]] == [
        ["train.lr=0.1", "best", "2", "2.5000"],
        ["train.lr=0.2", "1", "4.0000"],
    ]


def test_runs_are_chosen_by_id_experiment_or_sweep() -> None:
    one = log("0.1", 0, 1.0, sweep="f00: train.lr")
    log("0.2", 0, 1.1, sweep="f00: train.lr")
    log("0.3", 0, 1.2, **{"dvc.exp_name": "brave-newt"})
    assert [row[0] for row in rows("f00: train.lr")[1:]] == ["train.lr=0.1", "train.lr=0.2"]
    assert [row[0] for row in rows(one[:12], "brave-newt")[1:]] == ["train.lr=0.1", "train.lr=0.3"]
    assert rows(one)[1:] == [["best", "1", "1.0000", "0.0500"]]
    with pytest.raises(InputError, match="none of 3 runs has"):
        compare(["shy-owl"], "test/bits_per_byte")


def test_curves_over_steps_tokens_and_time(tmp_path: Path) -> None:
    """Two seeds of one rate and one of another, whose names are markup; each seed's losses are known."""
    client = connect()
    for lr, seed, losses in (("<i>", 0, [4.0, 2.0]), ("<i>", 1, [6.0, 4.0]), ("0.1", 0, [5.0, 5.0])):
        run_id = log(lr, seed, 1.0 + losses[-1])
        client.log_param(run_id, "train.batch_size", "8")
        client.log_param(run_id, "model.context_length", "16")
        start = client.get_run(run_id).info.start_time
        for metric in ("train/loss", "val/loss"):
            for step, loss in zip((10, 20), losses, strict=True):
                client.log_metric(run_id, metric, loss, timestamp=start + step * 6000, step=step)
    page = tmp_path / "curves.html"
    table = compare([], "test/bits_per_byte", page)
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "train.lr=&lt;i&gt;" in text
    assert "<i>" not in text.split("</pre>")[0]
    assert table.splitlines()[1].split()[0] == "train.lr=<i>"
    for name in ("svg", "png"):
        compare([], "test/bits_per_byte", tmp_path / f"curves.{name}")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match=r"curves\.pdf"):
        compare([], "test/bits_per_byte", tmp_path / "curves.pdf")
    runs = client.search_runs(["1"], order_by=["start_time"])
    found = mlflow.search_runs(experiment_names=["gptpipe"]).set_index("run_id").loc[[run.info.run_id for run in runs]]
    figure = _draw({"both": found.reset_index()[found["params.train.lr"].to_numpy() == "<i>"]})
    for panel, last in zip(figure.axes, (20, 20 * 8 * 16, 2.0), strict=False):
        (line,) = panel.lines
        assert list(line.get_xdata()) == pytest.approx([last / 2, last], rel=1e-3)
        assert list(line.get_ydata()) == [5.0, 3.0]
        (band,) = panel.collections
        assert (band.get_datalim(panel.transData).y0, band.get_datalim(panel.transData).y1) == (2.0, 6.0)

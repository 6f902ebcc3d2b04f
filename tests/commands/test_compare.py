"""`gptpipe compare` over runs with known metrics, compared with statistics computed here."""

import math
import re
from pathlib import Path

import mlflow
import pytest
from scipy.stats import sem, ttest_ind, ttest_rel
from tiny import make_model
from toy_registration import evaluate

from gptpipe.commands.compare import _draw, compare
from gptpipe.params import Params
from gptpipe.record.store import connect
from gptpipe.shell.errors import ConfigError, InputError

HEADER = (
    "runs",
    "test/bits_per_byte",
    "standard error",
    "difference",
    "its error",
    "p",
    "paired by",
)
pytestmark = pytest.mark.usefixtures("project")


def log_run(
    lr: str, seed: int, value: float, metric: str = "test/bits_per_byte", error: bool = True, **tags: str
) -> str:
    """Log a run with one metric, and its standard error if `error`; returns its id."""
    client = connect()
    experiment = client.get_experiment_by_name("gptpipe")
    assert experiment is not None
    run_id = client.create_run(
        experiment.experiment_id, tags={"params_digest": f"{lr} {seed}", **tags}
    ).info.run_id
    for key, text in (("train.lr", lr), ("seed", str(seed)), ("train.schedule", "linear")):
        client.log_param(run_id, key, text)
    client.log_metric(run_id, metric, value)
    if error:
        client.log_metric(run_id, f"{metric}_standard_error", 0.05)
    return str(run_id)


def rows(*names: str, metric: str = "test/bits_per_byte") -> list[list[str]]:
    """The cells of the table that are not empty, by row, the header first."""
    table = compare(names, metric)
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


def test_runs_are_grouped_over_seeds() -> None:
    for seed, (good, bad) in enumerate([(1.50, 1.60), (1.52, 1.70), (1.54, 1.65)]):
        log_run("0.001", seed, good)
        log_run("0.01", seed, bad)
    log_run("0.01", 2, 1.65)  # a repetition is no new evidence
    log_run("0.1", 0, 2.0)
    p = ttest_rel([1.50, 1.52, 1.54], [1.60, 1.70, 1.65]).pvalue
    error = sem([0.10, 0.18, 0.11])
    mean_error = f"{0.05 / 3**0.5:.4f}"
    assert rows() == [
        [*HEADER],
        ["train.lr=0.001", "best", "3", "1.5200", f"{0.02 / 3**0.5:.4f}"],
        ["train.lr=0.01", "3", "1.6500", mean_error, "0.1300", f"{error:.4f}", f"{p:.4f}", "3 seeds"],
        # One seed: standard error over documents.
        ["train.lr=0.1", "1", "2.0000", "0.0500", "0.4800", "nothing"],
    ]


def test_runs_of_different_seeds_are_not_paired() -> None:
    for seed, good, bad in ((0, 1.50, 1.60), (2, 1.52, 1.70), (4, 1.54, 1.65)):
        log_run("0.001", seed, good)
        log_run("0.01", seed + 1, bad)
    welch = ttest_ind([1.50, 1.52, 1.54], [1.60, 1.70, 1.65], equal_var=False)
    error = math.hypot(sem([1.50, 1.52, 1.54]), sem([1.60, 1.70, 1.65]))
    assert rows()[2][-4:] == ["0.1300", f"{error:.4f}", f"{welch.pvalue:.4f}", "nothing"]


@pytest.mark.slow
def test_single_runs_are_paired_by_document_if_their_test_documents_are_equal(
    params: Params, project: Path
) -> None:
    """The deviations of the documents are up to 4%, those of their differences 4% of 0.01 bits."""
    for i, (lr, bits, digest) in enumerate((("0.1", 2.0, "d1"), ("0.2", 2.01, "d1"), ("0.3", 2.02, "d2"))):
        run_id = log_run(lr, 0, bits)
        connect().set_terminated(run_id)
        model = make_model(project / f"{i}/gpt", seed=i)
        assert f"version {i + 1}" in evaluate(params, model, run_id, bits, digest)
    _, _, paired, other = rows()
    assert paired[-4:-2] == ["0.0100", "0.0001"]
    assert float(paired[-2]) < 1e-4
    assert paired[-1] == "10 documents"
    assert other[-1] == "nothing"


def test_highest_accuracy_is_the_best() -> None:
    log_run("0.1", 0, 0.2, "test/token_accuracy")
    log_run("0.2", 0, 0.3, "test/token_accuracy")
    assert [row[:2] for row in rows(metric="test/token_accuracy")[1:]] == [
        ["train.lr=0.2", "best"],
        ["train.lr=0.1", "1"],
    ]


def test_metric_without_a_standard_error_over_documents() -> None:
    """The standard error of a single seed is unknown then, and its cell is empty."""
    for seed, lr in enumerate(["0.1", "0.1", "0.2"]):
        log_run(lr, seed, 2.0 + seed, "train/loss", error=False)
    assert [row[:4] for row in rows(metric="train/loss")[1:]] == [
        ["train.lr=0.1", "best", "2", "2.5000"],
        ["train.lr=0.2", "1", "4.0000", "1.5000"],
    ]


def test_runs_are_selected_by_id_experiment_or_sweep() -> None:
    one = log_run("0.1", 0, 1.0, sweep="f00: train.lr")
    log_run("0.2", 0, 1.1, sweep="f00: train.lr")
    log_run("0.3", 0, 1.2, **{"dvc.exp_name": "brave-newt"})
    assert [row[0] for row in rows("f00: train.lr")[1:]] == ["train.lr=0.1", "train.lr=0.2"]
    assert [row[0] for row in rows(one[:12], "brave-newt")[1:]] == ["train.lr=0.1", "train.lr=0.3"]
    assert rows(one)[1:] == [["best", "1", "1.0000", "0.0500"]]
    with pytest.raises(InputError, match="none of 3 runs has"):
        compare(["shy-owl"], "test/bits_per_byte")


@pytest.fixture
def runs_with_curves(project: Path) -> None:
    """Two seeds of the learning rate `<i>`, which looks like markup, and one seed of 0.1."""
    client = connect()
    for lr, seed, losses in (("<i>", 0, [4.0, 2.0]), ("<i>", 1, [6.0, 4.0]), ("0.1", 0, [5.0, 5.0])):
        run_id = log_run(lr, seed, 1.0 + losses[-1])
        client.log_param(run_id, "train.batch_size", "8")
        client.log_param(run_id, "model.context_length", "16")
        start = client.get_run(run_id).info.start_time
        for metric in ("train/loss", "val/loss"):
            for step, loss in zip((10, 20), losses, strict=True):
                milliseconds = step * 6000  # a tenth of a minute per step
                client.log_metric(run_id, metric, loss, timestamp=start + milliseconds, step=step)


@pytest.mark.slow
@pytest.mark.usefixtures("runs_with_curves")
def test_curves_are_drawn_into_a_file(tmp_path: Path) -> None:
    page = tmp_path / "curves.html"
    table = compare([], "test/bits_per_byte", page)
    assert table.splitlines()[1].split()[0] == "train.lr=<i>"
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "train.lr=&lt;i&gt;" in text
    assert "<i>" not in text.split("</pre>")[0]
    for name in ("svg", "png"):
        compare([], "test/bits_per_byte", tmp_path / f"curves.{name}")
    assert (tmp_path / "curves.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"curves\.pdf"):
        compare([], "test/bits_per_byte", tmp_path / "curves.pdf")


@pytest.mark.usefixtures("runs_with_curves")
def test_curves_over_steps_tokens_and_minutes() -> None:
    runs = mlflow.search_runs(experiment_names=["gptpipe"])
    figure = _draw({"both seeds": runs[runs["params.train.lr"] == "<i>"]})
    last_x = {"step": 20, "tokens": 20 * 8 * 16, "minutes": 2.0}
    for panel, (label, last) in zip(figure.axes, last_x.items(), strict=False):
        assert panel.get_xlabel() == label
        (mean,) = panel.lines
        assert list(mean.get_xdata()) == pytest.approx([last / 2, last], rel=1e-3)
        assert list(mean.get_ydata()) == [5.0, 3.0]
        (band,) = panel.collections
        limits = band.get_datalim(panel.transData)
        assert (limits.y0, limits.y1) == (2.0, 6.0)

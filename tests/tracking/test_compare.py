"""`gptpipe compare` over runs whose figures are known, against statistics done by hand."""

import re

import pytest
from scipy.stats import ttest_ind

from gptpipe.errors import InputError
from gptpipe.tracking.compare import compare
from gptpipe.tracking.store import connect


def log(lr: str, seed: int, value: float, metric: str = "test/bits_per_byte", **tags: str) -> str:
    client = connect()
    experiment = client.get_experiment_by_name("gptpipe")
    assert experiment is not None
    run_id = client.create_run(experiment.experiment_id, tags={"params_digest": f"{lr} {seed}", **tags}).info.run_id
    for key, text in (("train.lr", lr), ("seed", str(seed)), ("train.schedule", "linear")):
        client.log_param(run_id, key, text)
    client.log_metric(run_id, metric, value)
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


def test_runs_are_chosen_by_id_experiment_or_sweep() -> None:
    one = log("0.1", 0, 1.0, sweep="f00: train.lr")
    log("0.2", 0, 1.1, sweep="f00: train.lr")
    log("0.3", 0, 1.2, **{"dvc.exp_name": "brave-newt"})
    assert [row[0] for row in rows("f00: train.lr")[1:]] == ["train.lr=0.1", "train.lr=0.2"]
    assert [row[0] for row in rows(one[:12], "brave-newt")[1:]] == ["train.lr=0.1", "train.lr=0.3"]
    assert rows(one)[1:] == [["best", "1", "1.0000", "0.0500"]]
    with pytest.raises(InputError, match="none of 3 runs has"):
        compare(["shy-owl"], "test/bits_per_byte")

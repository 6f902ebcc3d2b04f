"""The comparison with the champion that the report shows, from a real store."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import LINEAGE, make_model
from toy_registration import evaluate, toy_evaluation

from gptpipe.base.manifest import Manifest
from gptpipe.evaluate.champion import Comparison, compare_with_champion
from gptpipe.evaluate.charts import Line
from gptpipe.params import Params
from gptpipe.record.run import training_run

pytestmark = pytest.mark.usefixtures("project")

CURVES: dict[str, Line] = {"train": ([1, 2], [3.0, 2.0]), "val": ([0, 2], [3.5, 2.5])}
UNKNOWN = "e" * 32  # the id of a run that the store does not have


@pytest.fixture
def model(project: Path) -> Path:
    return make_model(project / "models/gpt")


def compared(
    params: Params, model: Path, bits: float | None, digest: str = "d1", split: Manifest = LINEAGE
) -> Comparison:
    return compare_with_champion(params, toy_evaluation(bits, digest, split), UNKNOWN, CURVES, model)


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments], check=True)


def head() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout[:12]


def test_the_first_model_and_the_champion_have_nothing_to_compare(params: Params, model: Path) -> None:
    assert compared(params, model, 2.0) == Comparison("There is no champion yet to compare with.")
    evaluate(params, model, None, 2.0)
    assert compared(params, model, 2.0) == Comparison("This model is the champion, gpt version 1.")


def test_the_difference_both_curves_and_what_changed(project: Path, params: Params, model: Path) -> None:
    git("init", "-q")
    Path("reports").mkdir()
    for name in ("one.py", "two.py", "params.yaml", "reports/metrics.json"):
        Path(name).write_text("seed: 1\n")
        git("add", name)
    git("commit", "-qm", "first")
    first = head()
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.metrics([(0, 1, {"val/loss": 4.0}), (1, 2, {"train/loss": 3.0})])
    evaluate(params, model, record.run_id, 2.0)

    for name in ("one.py", "reports/metrics.json"):
        Path(name).write_text("seed: 2\n")
    git("commit", "-qam", "second")
    Path("two.py").write_text("seed: 2\n")  # not committed
    Path("params.yaml").write_text("seed: 2\n")
    changed = params.model_copy(update={"train": params.train.model_copy(update={"lr": 0.003})})
    split = LINEAGE.model_copy(update={"made_from": {**LINEAGE.made_from, "raw": "d" * 64}})
    comparison = compared(changed, make_model(model, seed=1), 1.5, split=split)
    assert (
        comparison.headline == f"The champion before this evaluation is gpt version 1, of run {record.run_id}."
    )
    # Half a bit less on average, with deviations of up to 2%: sqrt(10 / 9 * 60) * 0.5 / 1000 = 0.0041.
    assert comparison.differences == [
        "On test: -0.5000 ± 0.0041 bits per byte on the same 10 documents; "
        "better than the champion by more than two standard errors."
    ]
    for name in ("train, this run", "val, this run", "train, champion", "val, champion"):
        assert f">{name}</text>" in comparison.loss_chart
    assert comparison.params == [("train.lr", "0.01", "0.003")]
    assert comparison.data == [
        ("raw", "a" * 12, "d" * 12),
        ("split", LINEAGE.digest[:12], split.digest[:12]),
    ]
    assert comparison.code == [
        f"This run is of commit {head()}, the champion of {first}.",
        "Files that differ: one.py, two.py.",
    ]


@pytest.mark.slow
def test_what_the_difference_shows_is_said_in_words(params: Params, model: Path) -> None:
    evaluate(params, model, None, 2.0)
    make_model(model, seed=1)
    assert (
        compared(params, model, 2.5)
        .differences[0]
        .endswith("; worse than the champion by more than two standard errors.")
    )
    # The same documents are up to 8% harder or easier for this model, and 0.1% harder on average.
    evaluation = toy_evaluation(2.002)
    nats = evaluation.documents["nats"].to_numpy()[::-1]
    evaluation = replace(evaluation, documents=evaluation.documents.assign(nats=nats))
    (chance,) = compare_with_champion(params, evaluation, UNKNOWN, CURVES, model).differences
    assert chance.startswith("On test: +0.0020 ± 0.0")
    assert chance.endswith("; within two standard errors, so it may be chance.")
    assert compared(params, model, 2.0, digest="d2").differences == [
        "On test: not comparable, because the champion was scored on other documents."
    ]
    assert compared(params, model, None).differences == []


def test_what_cannot_be_read_is_named_and_the_rest_is_compared(
    project: Path, params: Params, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(params, model, None, 2.0)
    make_model(model, seed=1)
    shutil.rmtree(next((project / "mlartifacts").rglob("documents")))
    comparison = compared(params, model, 2.0)
    assert len(comparison.differences) == 1
    assert comparison.differences[0].startswith("The scores of its documents cannot be read: ")
    assert comparison.code == ["The commit of one of the runs is not recorded."]
    assert (comparison.params, comparison.data) == ([], [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    down = compared(params, model, 2.0)
    assert down.headline.startswith("Not compared with the champion: tracking store: ")
    assert down == Comparison(down.headline)

"""The range of comparable runs: which runs are comparable, and what the report says about them."""

import pytest
from tiny import LINEAGE

from gptpipe.base.manifest import FileEntry
from gptpipe.evaluate.comparable_runs import comparable_runs, range_of
from gptpipe.params import Params
from gptpipe.record.run import training_run

HIGH = ([0, 10, 20], [5.0, 4.0, 3.0])
LOW = ([0, 20], [5.0, 2.0])  # 3.5 at step 10


def test_the_range_is_that_of_all_curves_at_the_steps_of_this_run() -> None:
    found = range_of([HIGH, LOW], ([0, 10, 20], [5.5, 3.6, 2.5]))
    assert (found.steps, found.lowest, found.highest) == ([0, 10, 20], [5.0, 3.5, 2.0], [5.0, 4.0, 3.0])
    assert found.sentence.endswith(" At step 20, this run is within the range of 2.000 to 3.000.")


@pytest.mark.parametrize(("loss", "place"), [(3.1, "above"), (3.0, "within"), (2.0, "within"), (1.9, "below")])
def test_the_sentence_says_where_the_run_ends(loss: float, place: str) -> None:
    assert f"At step 20, this run is {place} the range" in range_of([HIGH, LOW], ([20], [loss])).sentence


def test_steps_that_fewer_than_two_runs_reach_are_left_out() -> None:
    longer = ([0, 30], [5.0, 2.0])  # 3.0 at step 20
    found = range_of([HIGH, longer], ([20, 30], [3.0, 9.0]))
    assert (found.steps, "At step 20, this run is within" in found.sentence) == ([20], True)
    assert range_of([HIGH, LOW], ([30], [2.5])).sentence.endswith("are as long as this one.")


def test_one_other_run_is_no_range() -> None:
    assert range_of([], HIGH).sentence.startswith("The store has no other finished run on this training text")
    assert range_of([HIGH], HIGH).sentence.startswith("The store has only one other finished run")
    assert range_of([HIGH], HIGH).steps == ()


@pytest.mark.usefixtures("project")
def test_runs_with_other_text_or_other_batches_or_without_an_end_are_not_comparable(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(params: Params, losses: tuple[float, float], digest: str = "c", *, stop: bool = False) -> str:
        files = {name: FileEntry(sha256=digest * 64, n_bytes=1) for name in LINEAGE.files}
        with training_run(params, None, LINEAGE.model_copy(update={"files": files}), {}, 1000) as record:
            record.metrics([(step, 1, {"val/loss": loss}) for step, loss in zip((0, 8), losses, strict=True)])
            if stop:
                raise KeyboardInterrupt
        return record.run_id

    other_batches = params.model_copy(update={"train": params.train.model_copy(update={"batch_size": 3})})
    run(params, (5.0, 4.0))
    run(params, (5.0, 3.0))
    run(params, (9.0, 9.0), digest="d")
    run(other_batches, (9.0, 9.0))
    with pytest.raises(KeyboardInterrupt):
        run(params, (9.0, 9.0), stop=True)
    own = run(params, (5.0, 3.5))
    found = comparable_runs(params, LINEAGE, own, ([0, 8], [5.0, 3.5]))
    assert (found.steps, found.lowest, found.highest) == ([0, 8], [5.0, 3.0], [5.0, 4.0])
    assert found.sentence.startswith("2 other finished runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    down = comparable_runs(params, LINEAGE, own, ([0, 8], [5.0, 3.5]))
    assert (down.sentence.startswith("Not compared with other runs: tracking store: "), down.steps) == (
        True,
        (),
    )

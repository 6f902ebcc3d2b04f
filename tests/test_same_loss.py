"""The comparison of `benchmarks.same_loss`, on curves that are written down."""

from dataclasses import replace

import pandas as pd

from benchmarks.same_loss import Outcome, compare, first_difference

STEPS = pd.DataFrame(
    {"step": ["1", "2", "3"], "loss": ["6.9", "6.5000000000000001", "6.1"], "lr": ["0.1", "0.2", "0.3"]}
)
VALIDATIONS = pd.DataFrame(
    {"step": ["0", "3"], "train_loss": [float("nan"), "6.5"], "val_loss": ["7.0", "6.2"]}
)
OUTCOME = Outcome({"train": "a", "val": "b"}, STEPS, VALIDATIONS, "c", 1.0)


def test_equal_trainings_are_equal_to_the_bit() -> None:
    assert compare(OUTCOME, replace(OUTCOME, seconds=2.0)) == (
        [
            "data: the same tokens",
            "steps: all 3 are equal to the bit",
            "validations: all 2 are equal to the bit",
            "weights: equal to the bit",
        ],
        True,
    )


def test_the_first_step_that_differs_is_named_with_its_values() -> None:
    other = STEPS.copy()
    other.loc[1:, "loss"] = ["6.5", "6.0"]  # the same number in another form would be of another program too
    lines, is_same = compare(OUTCOME, replace(OUTCOME, steps=other, weights="d"))
    assert lines[1] == "steps: step 2 is the first that differs: loss 6.5000000000000001 against 6.5"
    assert lines[3] == "weights: different"
    assert not is_same


def test_each_kind_of_difference_is_one() -> None:
    assert not compare(OUTCOME, replace(OUTCOME, data={"train": "a", "val": "x"}))[1]
    assert not compare(OUTCOME, replace(OUTCOME, weights="x"))[1]
    assert not compare(OUTCOME, replace(OUTCOME, validations=VALIDATIONS.head(1)))[1]
    assert first_difference(STEPS, STEPS.head(2)) == "equal to the bit in the first 2, then 3 against 2"
    assert first_difference(STEPS, STEPS.assign(step=["1", "3", "4"])) == "step 2 against step 3"


def test_columns_that_one_commit_does_not_have_are_not_compared() -> None:
    assert first_difference(STEPS, STEPS.assign(grad_norm="1")) is None
    assert first_difference(STEPS, STEPS.drop(columns="lr")) is None

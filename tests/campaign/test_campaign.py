"""The short campaign: a few faults of every kind in every stage. `python -m tests.campaign` runs many more."""

import pytest

from campaign.command import Worker, shown
from campaign.plan import plan
from campaign.project import STAGES

SEED = 14
# Number of trials of each kind; fewer for the slow stages.
QUICK = {"kill": 4, "cut": 3, "fail": 3, "damage": 4, "leftover": 2, "race": 1}
TRAIN = {"kill": 4, "cut": 2, "fail": 2, "damage": 3, "leftover": 1, "race": 1}
EVALUATE = {"kill": 3, "cut": 0, "fail": 2, "damage": 3, "leftover": 1, "race": 1}
COUNTS = {**dict.fromkeys(STAGES, QUICK), "train": TRAIN, "evaluate": EVALUATE}


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("stage", STAGES)
def test_a_rerun_after_a_fault_ends_like_an_undisturbed_run(worker: Worker, stage: str, kind: str) -> None:
    trials = plan(worker.hello, {kind: COUNTS[stage][kind]}, {stage, kind}, SEED)
    results = map(worker.try_out, trials)
    if differing := [shown(result) for result in results if result["differences"]]:
        pytest.fail("\n".join(differing), pytrace=False)

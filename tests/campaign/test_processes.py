"""A stage whose parent is killed, with real processes. `python -m tests.campaign` has more such trials."""

from pathlib import Path

import pytest

from campaign.processes import RealProjects, try_out_for_real


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory, reproduced: Path) -> RealProjects:
    return RealProjects(tmp_path_factory.mktemp("real"), reproduced)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0.15, 0.6, 1.0])
def test_a_stage_whose_parent_is_killed_does_not_disturb_the_next_run(
    projects: RealProjects, at: float
) -> None:
    assert try_out_for_real({"kind": "orphan", "at": at}, projects)["differences"] == []

"""A registration that is killed or stopped at any write, then repeated: one run, one model, one version."""

import os
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from tiny import make_model
from toy_registration import ENDED, Registration, evaluate, in_a_child

from gptpipe.params import Params

pytestmark = pytest.mark.usefixtures("project")

SAMPLES = (0.3, 0.6, 0.9)  # the usual test interrupts at these fractions of all writes


@pytest.fixture(scope="module", autouse=True)
def _libraries(tmp_path_factory: pytest.TempPathFactory, fresh_store: Path, shipped: Params) -> None:
    """Register a model once in this process, so that forked processes inherit MLflow's imports."""
    with pytest.MonkeyPatch.context() as patch:
        project = tmp_path_factory.mktemp("warm")
        shutil.copy(fresh_store, project / "mlflow.db")
        patch.chdir(project)
        patch.setenv("DVC_ROOT", str(project))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert "first champion" in evaluate(shipped, make_model(project / "models/gpt"), None, 2.0)


def n_writes(registration: Registration) -> int:
    """The number of writes of an uninterrupted registration. Also checks that a repetition changes nothing."""
    code, n = in_a_child(registration.act)
    assert code == ENDED
    registration.check()
    assert in_a_child(registration.act)[0] == ENDED
    registration.check()
    return n


@pytest.fixture
def registration(project: Path, params: Params, is_known: bool) -> Iterator[Registration]:
    yield Registration(project, params, is_known=is_known)
    shutil.rmtree(project.with_name("kept"))


# A few of the cases and writes; GPTPIPE_TEST_STRIDE=5 takes all cases and every fifth write, in minutes.
STRIDE = int(os.environ.get("GPTPIPE_TEST_STRIDE", "0"))
CASES = list(product((True, False), ("kill", "stop"))) if STRIDE else [(True, "stop"), (False, "kill")]


@pytest.mark.slow
@pytest.mark.parametrize(("is_known", "fault"), CASES)
def test_a_registration_interrupted_at_some_writes_is_completed_by_a_rerun(
    registration: Registration, fault: str
) -> None:
    n = n_writes(registration)
    assert n > 100
    for at in range(0, n, STRIDE) if STRIDE else [int(position * n) for position in SAMPLES]:
        registration.try_fault(fault, at)

"""What tests of several rooms share: the shipped parameters, and an environment that nothing leaks into."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sections import filters
from toy_pipeline import commit, make_project, run

from gptpipe.config import CollectParams, Params, load_params

ROOT = Path(__file__).parents[1]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: tests run on all cores, and threads of several would wait in turns


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken caches below the test's own folder, and no setting of the caller's shell reaches a test."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME",
                 "GPTPIPE_VERBOSITY", "GPTPIPE_ENGINE", "RAY_ADDRESS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPTPIPE_WORKERS", "1")


@pytest.fixture
def params() -> Params:
    """The params.yaml that ships."""
    return load_params(ROOT / "params.yaml")


@pytest.fixture
def collect_params() -> Callable[..., CollectParams]:
    """Makes section `collect` from sources and what differs from: keep everything, drop equal texts."""

    def make(*sources: dict[str, Any], **changed: Any) -> CollectParams:
        values = {
            "sources": sources,
            "encoding_errors": "strict",
            "min_document_bytes": 1,
            "max_document_bytes": 1_000_000,
            "max_expansion": 200,
            "dedup": "exact",
            "near_similarity": 0.7,
        }
        return CollectParams.model_validate({**values, **changed, "filters": filters(**changed.get("filters", {}))})

    return make


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after its first `dvc repro`, committed."""
    project = make_project(tmp_path_factory.mktemp("project"))
    run(project, "dvc", "repro")
    commit(project)
    return project

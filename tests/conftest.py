"""What tests of several rooms share: the shipped parameters, and an environment that nothing leaks into."""

import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sections import SHIPPED, filters, split_params, tokenize_params
from toy_pipeline import commit, make_project, run

from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.params import Params, load_params
from gptpipe.split.params import SplitParams
from gptpipe.tokenize.params import TokenizeParams

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


@pytest.fixture(scope="session")
def shipped() -> Params:
    """The params.yaml that ships, for fixtures of more than one test."""
    return SHIPPED


@pytest.fixture
def corpus(tmp_path: Path, collect_params: Callable[..., CollectParams]) -> Callable[[Iterable[str]], Path]:
    """Makes a data/raw of one-line documents."""

    def make(lines: Iterable[str]) -> Path:
        (tmp_path / "corpus.txt").write_text("\n".join(lines))
        source = {"kind": "text", "paths": (str(tmp_path / "corpus.txt"),), "document": "line"}
        collect(collect_params(source), tmp_path / "raw")
        return tmp_path / "raw"

    return make


@pytest.fixture
def sentences() -> list[str]:
    """300 distinct documents of made-up words, enough for a small vocabulary."""
    random_ = random.Random(0)
    words = ["".join(random_.choices("abcdefghijklmnop", k=random_.randrange(2, 9))) for _ in range(200)]
    return [f"{i}: " + " ".join(random_.choices(words, k=30)) for i in range(300)]


@pytest.fixture
def trained() -> TokenizeParams:
    return tokenize_params(vocab_size=400)


@pytest.fixture
def fifths() -> SplitParams:
    return split_params(val_fraction=0.2, test_fraction=0.2)


@pytest.fixture(scope="session")
def toy_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of made-up sentences, through the real stages."""
    import tiny  # late: torch takes seconds, and not every test needs it

    return tiny.make_split(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without an experiment of ours. Making one takes seconds, so tests share this one as a copy."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
    return path


@pytest.fixture
def project(tmp_path: Path, fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with an empty store as the current folder; MLflow may not load pickles."""
    (tmp_path / ".dvc").mkdir()
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    return tmp_path

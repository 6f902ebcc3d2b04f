"""Fixtures shared by several test folders, and how the suite is ordered and reported."""

import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from sections import SHIPPED, filters, split_params, tokenize_params
from toy_pipeline import commit, copy_project, make_project, run

from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.params import Params, load_params
from gptpipe.split.params import SplitParams
from gptpipe.tokenize.params import TokenizeParams

SharedFolder = Callable[[str, Callable[[Path], object]], Path]
ROOT = Path(__file__).parents[1]
# Each file of tests runs on one worker (`--dist loadfile`). The longest come first, so that all workers end
# together. A file that does not need `reproduced` is second, because the second worker would only wait for the
# first to build it.
LONGEST_FILES = (
    "tests/test_experiments.py",
    "tests/train/test_distributed.py",
    "tests/campaign/test_campaign.py",
    "tests/test_pipeline.py",
    "tests/test_continuing.py",
    "tests/record/test_server.py",
    "tests/collect/test_collect.py",
    "tests/base/test_parallel.py",
    "tests/train/test_checkpoint.py",
    "tests/train/test_runtime.py",
    "tests/train/test_session.py",
    "tests/evaluate/test_ui.py",
    "tests/evaluate/test_registry.py",
    "tests/harness/test_tasks.py",
    "tests/record/test_run.py",
    "tests/fuzz/test_fuzz.py",
    "tests/collect/test_open_files.py",
)
SETTINGS = (
    "DVC_ROOT",
    "DVC_EXP_NAME",
    "DVC_EXP_BASELINE_REV",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "GPTPIPE_VERBOSITY",
    "GPTPIPE_ENGINE",
    "GPTPIPE_SERVE_KEY",
    "RAY_ADDRESS",
)
# Before torch is imported: several workers with several threads each slow down.
os.environ["OMP_NUM_THREADS"] = "1"
# Most tests write small files that are synced to the disk one by one. In shared memory, syncing costs nothing.
SHARED_MEMORY, ENOUGH_BYTES = Path("/dev/shm"), 4 << 30
if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ENOUGH_BYTES:
    # Where pytest makes its temporary folders.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SHARED_MEMORY))
# Before `datasets` is imported: it copies what it reads to its cache.
TEMPORARY = os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir()
os.environ["HF_DATASETS_CACHE"] = f"{TEMPORARY}/datasets-of-tests"


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, because tests often wait for servers, locks and other processes."""
    return 1 + (os.cpu_count() or 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if missing := [name for name in LONGEST_FILES if not (ROOT / name).is_file()]:
        raise pytest.UsageError(f"tests/conftest.py: LONGEST_FILES: no such file: {', '.join(missing)}")
    positions = {ROOT / name: position for position, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: positions.get(item.path, len(positions)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_if_skipped(report)
    return report


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skipped test into a failure in CI, where `.ci/run` has installed everything that tests need."""
    if os.environ.get("GPTPIPE_CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"GPTPIPE_CI is set, but {report.nodeid} was skipped: {reason}"


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep settings of the caller's shell away from tests, and tiktoken's cache in the test's own folder."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPTPIPE_WORKERS", "1")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """Makes folders that all workers of this run of pytest share: the first worker that needs one builds it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, build: Callable[[Path], object]) -> Path:
        folder, done = root / f"shared-{name}", root / f"shared-{name}.done"
        with FileLock(root / f"shared-{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a build that failed
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return make


@pytest.fixture
def params() -> Params:
    """The params.yaml that ships."""
    return load_params(ROOT / "params.yaml")


@pytest.fixture
def collect_params() -> Callable[..., CollectParams]:
    """Makes section `collect`: by default it keeps every document and removes exact duplicates."""

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
        return CollectParams.model_validate(
            {**values, **changed, "filters": filters(**changed.get("filters", {}))}
        )

    return make


@pytest.fixture(scope="session")
def reproduced(shared_folder: SharedFolder) -> Path:
    """A project after its first `dvc repro`, committed. All share it: run nothing in it, use `project_copy`."""

    def build(folder: Path) -> None:
        make_project(folder)
        run(folder, "dvc", "repro")
        commit(folder)

    return shared_folder("project", build)


@pytest.fixture
def project_copy(reproduced: Path, tmp_path: Path) -> Path:
    """A copy of `reproduced` that the test may change."""
    return copy_project(reproduced, tmp_path / "copy")


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
def toy_split(shared_folder: SharedFolder) -> Path:
    """A split of made-up sentences, made by the real stages. All workers share it, so no test may change it."""

    def build(folder: Path) -> None:
        import tiny  # late: torch takes seconds, and not every test needs it

        tiny.make_split(folder)

    return shared_folder("toy", build) / "split"


@pytest.fixture(scope="session")
def fresh_store(shared_folder: SharedFolder) -> Path:
    """A store without an experiment of ours. Making one takes seconds, so tests copy this one."""

    def build(folder: Path) -> None:
        from mlflow.tracking import MlflowClient

        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        with closing(sqlite3.connect(folder / "mlflow.db")) as database:
            database.execute("PRAGMA journal_mode=WAL")

    return shared_folder("store", build) / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with an empty store as the current folder; MLflow may not load pickles."""
    (tmp_path / ".dvc").mkdir()
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    return tmp_path

"""MLflow's pages of a toy run in a browser, as `mlflow ui` shows them."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from browser import browser  # noqa: F401  (a fixture)

from gptpipe.base.files import write_json
from gptpipe.base.manifest import read_manifest
from gptpipe.evaluate.champion import Comparison
from gptpipe.evaluate.comparable_runs import Comparable
from gptpipe.evaluate.evaluate import evaluate_model
from gptpipe.evaluate.model_card import write_model_card
from gptpipe.evaluate.registry import record_evaluation
from gptpipe.evaluate.report import draw_charts, read_training_reports, write_report
from gptpipe.evaluate.training_cost import training_cost
from gptpipe.record.run import training_run
from gptpipe.record.store import connect
from gptpipe.train.session import train_model

pytestmark = pytest.mark.usefixtures("project")

COLUMNS = [
    "test/bits_per_byte",
    "val/bits_per_byte",
    "val/loss",
    "params_digest",
    "environment.device",
    "changed",
]
CHARTS = [
    "loss",
    "learning_rate",
    "gradient_norm",
    "loss_by_position",
    "accuracy_by_position",
    "bits_per_byte_by_source",
    "calibration",
    "length_of_documents",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, toy_split: Path, fresh_store: Path) -> tuple[Path, str]:
    """The root of a project after stages train and evaluate of an experiment, and the id of the run."""
    root = tmp_path_factory.mktemp("recorded")
    (root / ".dvc").mkdir()
    shutil.copy(fresh_store, root / "mlflow.db")
    params = tiny.params()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):  # MLflow sets the second
            patch.delenv(name, raising=False)
        patch.setenv("DVC_EXP_NAME", "dapper-owl")
        model, reports = Path("models/gpt"), Path("reports")
        train_model(params, toy_split, model, reports, functools.partial(training_run, params))
        run_id = json.loads((reports / "mlflow_run.json").read_bytes())["run_id"]
        evaluation = evaluate_model(model, toy_split, reports, params.evaluate, params.seed)
        training, counts = read_training_reports(reports, model), read_manifest(toy_split.parent / "raw").counts
        alone = Comparable("There is no other run.")
        charts = draw_charts(reports, training, alone)
        none = Comparison("There is no champion yet to compare with.")
        page = write_report(reports, training, params, evaluation.split, counts, charts, none, alone)
        write_json(reports / "split.json", {"share": {}})
        card = write_model_card(reports, model, params.collect.sources, evaluation, training_cost(run_id))
        record_evaluation(params, params.evaluate, evaluation, run_id, card, page, charts, model)
    return root, run_id


@pytest.mark.slow
def test_charts_are_logged_to_the_run(recorded: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, run_id = recorded
    monkeypatch.chdir(root)
    names = {Path(file.path).stem for file in connect().list_artifacts(run_id, "figures")}
    assert names == set(CHARTS)


@pytest.fixture(scope="module")
def ui(recorded: tuple[Path, str]) -> Iterator[str]:
    """The address of `mlflow ui`, started in the root.

    Only the port, so that tests do not collide, and one worker instead of four, each of which imports MLflow
    anew.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    variables["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # job execution would start a dozen processes
    with (recorded[0] / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"],
            cwd=recorded[0],
            env=variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        assert process.poll() is None, (recorded[0] / "ui.log").read_text()
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def shows(browser: Any, *words: str) -> None:  # noqa: F811
    """Wait until the page contains all words."""
    deadline = time.monotonic() + 120
    while missing := [
        word for word in words if word not in browser.execute_script("return document.body.innerText")
    ]:
        assert time.monotonic() < deadline, f"{browser.current_url}: no {missing}"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.browser
def test_the_pages_of_a_run_and_of_its_model_in_a_browser(
    browser: Any,  # noqa: F811
    ui: str,
    recorded: tuple[Path, str],
) -> None:
    run_id = recorded[1]
    browser.set_window_size(1700, 1000)  # the table has only the columns that fit
    browser.get(f"{ui}/#/experiments/1/runs")
    shows(browser, "dapper-owl", "All runs with their figures", "split/train", "stages.train")
    browser.find_element("css selector", "[data-component-id='mlflow.assistant.chat_panel.close']").click()
    browser.find_element("link text", "All runs with their figures").click()
    browser.switch_to.window(browser.window_handles[-1])
    shows(browser, "dapper-owl", *COLUMNS)

    run = f"{ui}/#/experiments/1/runs/{run_id}"
    browser.get(run)
    shows(browser, "parameters as committed", "test/perplexity", "Red flags: ", f"gptpipe restore {run_id}")
    shows(browser, "split/train", "params_digest", "train.lr")
    browser.get(f"{run}/model-metrics")
    shows(browser, "train", "val", "test")
    browser.find_element("css selector", "input[placeholder='Search metric charts']").send_keys(
        "(train|val)/loss$"
    )
    shows(browser, "dapper-owl (train/loss)", "dapper-owl (val/loss)")
    browser.get(f"{run}/artifacts")
    for name, words in (
        ("samples.json", ["step", "continuation"]),
        ("figures", [f"{name}.svg" for name in CHARTS]),
    ):
        shows(browser, name)
        browser.find_element("xpath", f"//*[text()='{name}']").click()
        shows(browser, *words)

    browser.get(f"{ui}/#/models/gpt/versions/1")
    shows(browser, "champion", "dapper-owl", "bits per byte", "Made from")

"""Registering a model: metrics in its run, the champion, and the registered model as MLflow serves it."""

import json
import os
import shutil
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import uvicorn
from mlflow.pyfunc.scoring_server import init
from tiny import LINEAGE, make_model
from toy_registration import evaluate

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import new_folder
from gptpipe.params import Params
from gptpipe.record.run import training_run
from gptpipe.record.store import connect
from gptpipe.shell.errors import IntegrityError

pytestmark = pytest.mark.usefixtures("project")


@pytest.fixture
def model(project: Path) -> Path:
    return make_model(project / "models/gpt")


def champion() -> str:
    return str(connect().get_model_version_by_alias("gpt", "champion").version)


def another(model: Path) -> None:
    """Make it another model by adding a file."""
    content = {path.name: path.read_bytes() for path in model.iterdir() if path.name != "manifest.json"}
    with new_folder(model, {}) as new:
        for name, text in {**content, f"more-{len(content)}": b""}.items():
            write_bytes(new.path / name, text)


@pytest.mark.slow
def test_the_champion_moves_only_to_a_better_model_on_the_same_test_documents(
    params: Params, model: Path
) -> None:
    """Of ten documents with 2 bits per byte, the first model has up to 4% more or less in each."""
    assert "the first champion" in evaluate(params, model, None, 2.0)
    assert champion() == "1"
    another(model)
    assert "stays with 2.0000" in evaluate(params, model, None, 2.5)
    another(model)
    # Equal documents: the difference and its error are 0.
    line = evaluate(params, model, None, 2.0)
    stays = "stays with 2.0000 bits per byte on test"
    assert f"{stays}; the difference is +0.0000 ± 0.0000 bits per byte on the same 10" in line
    assert champion() == "1"
    another(model)
    assert "stays: it was tested on other documents" in evaluate(params, model, None, 1.0, digest="d2")
    another(model)
    assert "no champion is chosen" in evaluate(params, model, None, None)
    assert champion() == "1"
    another(model)
    # Half a bit less on average, with deviations of up to 2%: sqrt(10 / 9 * 60) * 0.5 / 1000 = 0.0041.
    line = evaluate(params, model, None, 1.5)
    assert (
        "the new champion: 1.5000 bits per byte on test, 2.0000 before; the difference is -0.5000 ± 0.0041"
        in line
    )
    assert champion() == "6"
    assert "version 6, which is the champion already" in evaluate(params, model, None, 1.5)


def test_a_champion_without_readable_scores_stays(params: Params, model: Path, project: Path) -> None:
    evaluate(params, model, None, 2.0)
    (scores,) = (project / "mlartifacts").rglob("scores.parquet")
    content = scores.read_bytes()
    scores.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    another(model)
    line = evaluate(params, model, None, 1.0)
    assert "version 1, stays: its scores cannot be read" in line
    assert "scores.parquet: differs from its manifest" in line
    assert champion() == "1"


def test_a_model_is_registered_once_even_if_it_is_evaluated_again(
    params: Params, model: Path, project: Path
) -> None:
    """By two runs, and with other values of `evaluate`. A damaged or lost copy is uploaded again."""
    evaluate(params, model, "a" * 32, 2.0)
    changed = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"top_k": 7})})
    assert "version 1, which is the champion already" in evaluate(changed, model, "b" * 32, 2.0)
    client = connect()
    (version,) = client.search_model_versions("name = 'gpt'")
    experiment = client.get_experiment_by_name("gptpipe").experiment_id
    (logged,) = client.search_logged_models([experiment])
    outputs = {run.outputs.model_outputs[0].model_id for run in client.search_runs([experiment])}
    assert (version.source, outputs) == (f"models:/{logged.model_id}", {logged.model_id})
    (stored,) = (project / "mlartifacts").rglob("model.safetensors")
    content = stored.read_bytes()
    for damage in (lambda: stored.write_bytes(b""), lambda: shutil.rmtree(stored.parent)):
        damage()
        assert "version 1" in evaluate(params, model, "a" * 32, 2.0)
        assert stored.read_bytes() == content
    client.delete_logged_model(logged.model_id)  # as a user may do
    assert "version 2" in evaluate(params, model, "a" * 32, 2.0)
    assert [str(version.version) for version in client.search_model_versions("name = 'gpt'")] == ["2"]
    assert len(client.search_logged_models([experiment])) == 1
    assert champion() == "2"


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_the_run_of_an_evaluated_model_becomes_finished(params: Params, model: Path, status: str) -> None:
    client = connect()
    run_id = client.create_run(client.get_experiment_by_name("gptpipe").experiment_id).info.run_id
    if status != "RUNNING":
        client.set_terminated(run_id, status)
    evaluate(params, model, run_id, 2.0)
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_two_evaluations_at_once_register_one_version(params: Params, model: Path, project: Path) -> None:
    connect()
    children = []
    for name in "ab":
        children.append(os.fork())
        if children[-1] == 0:
            os._exit("version 1" not in evaluate(params, model, name * 32, 2.0))
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        assert store.execute("select count(*) from model_versions").fetchall() == [(1,)]
        assert store.execute("select count(*) from logged_models").fetchall() == [(1,)]
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)] * 2


def test_metrics_are_logged_to_the_run_of_the_training(params: Params, model: Path) -> None:
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        pass
    evaluate(params, model, record.run_id, 2.0)
    client = connect()
    run = client.get_run(record.run_id)
    assert (run.data.metrics["test/bits_per_byte"], run.info.status) == (2.0, "FINISHED")
    version = client.get_model_version("gpt", "1")
    assert (version.run_id, version.description) == (record.run_id, "# card")


@pytest.mark.parametrize("logged", [1.0 + 1e-9, 1.003])
def test_the_metrics_of_the_best_validation_are_logged_once(params: Params, model: Path, logged: float) -> None:
    """Evaluation scores the same documents as the training did; a second point would distort the curve.

    This is so even if another device gives another value.
    """
    with training_run(params, None, LINEAGE, {}, 1_853_056) as record:
        record.metrics([(0, 1, {"val/loss": 8.0}), (7, 2, {"val/loss": logged})])
    evaluate(params, model, record.run_id, 2.0)
    evaluate(params, model, record.run_id, 1.9)
    history = {
        key: [(m.step, m.value) for m in connect().get_metric_history(record.run_id, key)]
        for key in ("val/loss", "test/bits_per_byte")
    }
    assert history == {"val/loss": [(0, 8.0), (7, logged)], "test/bits_per_byte": [(7, 2.0), (7, 1.9)]}


def test_a_run_that_the_store_does_not_know_is_replaced_by_a_new_run(params: Params, model: Path) -> None:
    evaluate(params, model, "0" * 32, 2.0)
    client = connect()
    (run,) = client.search_runs([client.get_experiment_by_name("gptpipe").experiment_id])
    assert run.data.tags["training_run_id"] == "0" * 32
    assert run.data.metrics["test/bits_per_byte"] == 2.0


def test_a_store_that_does_not_answer_gives_a_warning(
    params: Params, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert evaluate(params, model, None, 2.0).startswith("warning: not recorded")


def test_the_registered_model_generates_without_pickle(params: Params, model: Path, project: Path) -> None:
    evaluate(params, model, None, 2.0)
    assert not [p for p in (project / "mlartifacts").rglob("*") if p.suffix in (".pkl", ".pickle", ".pt")]
    loaded = mlflow.pyfunc.load_model("models:/gpt@champion")
    prompts = pd.DataFrame({"prompt": ["the cat", "the dog"]})
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    first = loaded.predict(prompts, params=options)
    assert first["text"].str.startswith(("the cat", "the dog")).all()
    assert first.equals(loaded.predict(prompts, params=options))
    assert not first.equals(loaded.predict(prompts, params={**options, "seed": 4}))
    with pytest.raises(mlflow.MlflowException, match="temperature"):
        loaded.predict(prompts, params={"temperature": "hot"})


CAT = "the cat"
FORMS = {
    "a text": CAT,
    "a list": [CAT],
    "a dict": {"prompt": CAT},
    "a dict with a list": {"prompt": [CAT]},
    "a list of dicts": [{"prompt": CAT}],
    "an array": np.array([CAT]),
    "a column": pd.Series([CAT]),
    "a table": pd.DataFrame({"prompt": [CAT], "id": [7]}),
}


def test_prompts_may_be_a_text_a_list_a_dict_or_a_table_and_are_streamed(params: Params, model: Path) -> None:
    evaluate(params, model, None, 2.0)
    loaded = mlflow.pyfunc.load_model("models:/gpt@champion")
    options = {"max_new_tokens": 6}
    (text,) = loaded.predict(CAT, params=options)["text"]
    assert text.startswith(CAT)
    for form, prompts in FORMS.items():
        assert list(loaded.predict(prompts, params=options)["text"]) == [text], form
    assert list(loaded.predict([CAT, CAT], params=options)["text"]) == [text, text]
    pieces = list(loaded.predict_stream({"prompt": CAT}, params=options))
    assert (pieces[0], "".join(pieces)) == (CAT, text)
    assert len(pieces) > 2
    for wrong in (None, [CAT, None], {"prompt": None}, pd.DataFrame({"prompt": [CAT, None]})):
        with pytest.raises(mlflow.MlflowException, match=r"prompt \d is null"):
            loaded.predict(wrong)
    with pytest.raises(
        mlflow.MlflowException, match="unknown parameter tempature; there are max_new_tokens, seed"
    ):
        loaded.predict(CAT, params={"tempature": 1.0})


GOOD = [
    {"inputs": CAT},
    {"inputs": [CAT]},
    {"inputs": {"prompt": CAT}},
    {"instances": [CAT]},
    {"instances": [{"prompt": CAT}]},
    {"dataframe_records": [{"prompt": CAT}]},
    {"dataframe_split": {"columns": ["prompt"], "data": [[CAT]]}},
]
WRONG = [
    ({"inputs": [CAT], "params": {"temperature": -1.0}}, "temperature is -1.0; it must be 0 or more"),
    ({"inputs": [CAT], "params": {"top_k": -1}}, "top_k is -1; it must be 1 or more"),
    ({"inputs": [CAT], "params": {"top_p": 0.0}}, "top_p is 0.0; it must be above 0"),
    ({"inputs": [CAT], "params": {"max_new_tokens": 0}}, "max_new_tokens must be 1 or more"),
    ({"inputs": [CAT], "params": {"max_new_tokens": "many"}}, "max_new_tokens"),
    ({"inputs": [CAT], "params": {"temperature": "hot"}}, "temperature"),
    ({"inputs": [CAT], "params": {"temperature": None}}, "temperature is null"),
    ({"inputs": [CAT], "params": []}, "must be a dictionary"),
    ({"inputs": [CAT], "params": {"tempature": 1.0}}, "unknown parameter tempature"),
    ({"inputs": None}, "prompt 1 is null"),
    ({"inputs": [CAT, None]}, "prompt 2 is null"),
    ({"inputs": {"prompt": None}}, "prompt 1 is null"),
    ({"inputs": 3}, "prompt 1 is of type int"),
    ({"inputs": "\ud800"}, "prompt 1 is not valid Unicode"),
    ({"dataframe_records": [{"prompt": CAT}, {"prompt": None}]}, "prompt 2 is null"),
    ({"dataframe_records": [{"text": CAT}]}, "no column `prompt`"),
    ({"prompt": CAT, "tempature": 1.0}, "the one key `prompt`, not prompt, tempature"),
]


def test_the_served_model_answers_with_text_and_explains_refusals(
    params: Params, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the server program of `mlflow models serve`."""
    evaluate(params, model, None, 2.0)
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # init would set it permanently
    app = init(mlflow.pyfunc.load_model("models:/gpt@champion"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}/invocations"
            for good in GOOD:
                status, answer = ask(address, {**good, "params": {"max_new_tokens": 4}})
                assert status == 200, answer
                assert answer["predictions"][0]["text"].startswith(CAT)
            status, answer = ask(address, {"prompt": CAT, "max_new_tokens": 4})
            assert (status, answer[0]["text"][:7]) == (200, CAT)
            for wrong, words in WRONG:
                status, answer = ask(address, wrong)
                assert (status, "stack_trace" in answer) == (400, False), answer
                assert words in answer["message"]
        finally:
            server.should_exit = True
            thread.join()


def ask(address: str, content: dict[str, Any]) -> tuple[int, Any]:
    body = json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_registered_model_with_changed_files_is_refused(params: Params, model: Path, project: Path) -> None:
    evaluate(params, model, None, 2.0)
    (stored,) = (project / "mlartifacts").rglob("model.safetensors")
    for name, old, new in (
        ("ranks.tiktoken", b" 1\n", b" 2\n"),
        ("config.json", b'"n', b'"m'),
    ):
        path = stored.with_name(name)
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))
        with pytest.raises(IntegrityError, match=f"{name}: differs from its manifest"):
            mlflow.pyfunc.load_model("models:/gpt@champion")
        path.write_bytes(content)

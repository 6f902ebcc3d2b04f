"""What `import gptpipe` offers, and the example in docs/use-from-python.md."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from toy_registration import evaluate

import gptpipe
from gptpipe.formats.streams import open_stream
from gptpipe.model.generate import Sampling
from gptpipe.record.run import training_run
from gptpipe.score.text_batch import continue_text
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError
from gptpipe.train.session import train_model

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/use-from-python.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, toy_split: Path, fresh_store: Path) -> Path:
    """A project with a split, a model and a recorded run."""
    root = tmp_path_factory.mktemp("project")
    (root / ".dvc").mkdir()
    (root / "data").mkdir()
    (root / "data/split").symlink_to(toy_split)
    (root / "mlflow.db").write_bytes(fresh_store.read_bytes())
    params = tiny.params()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)

        def record(*arguments: object, **named: object) -> object:
            return training_run(params, *arguments, **named)

        train_model(params, toy_split, Path("models/gpt"), Path("reports"), record)
    return root


@pytest.fixture
def model(trained: Path, monkeypatch: pytest.MonkeyPatch) -> gptpipe.Model:
    monkeypatch.chdir(trained)
    return gptpipe.load_model()


def test_importing_gptpipe_imports_nothing_heavy() -> None:
    heavy = {"torch", "mlflow", "numpy", "pydantic"}
    script = f"import sys, gptpipe; dir(gptpipe); print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in set(gptpipe.__all__) - {"__version__"}:
        assert getattr(gptpipe, name).__doc__
        assert name in dir(gptpipe)
        assert f"`gptpipe.{name}" in PAGE.read_text() or f"`{name}." in PAGE.read_text()
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        gptpipe.load  # noqa: B018


def test_the_example_of_the_documentation_runs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    assert isinstance(names["texts"], list)
    assert [tuple(names[name].shape) for name in ("tokens", "targets")] == [(4, 16), (4, 16)]  # type: ignore[attr-defined]
    steps = json.loads((trained / "reports/train.json").read_text())
    assert steps
    assert "Name: train/loss" in capsys.readouterr().out


def test_a_prompt_gets_the_same_text_alone_in_a_list_and_in_pieces(model: gptpipe.Model) -> None:
    options = {"max_new_tokens": 12, "seed": 4, "temperature": 1.1, "top_k": None, "stop": ["\n"]}
    prompts = ["the cat", "", "a dog near the old tree sees the red cat and the blue dog"]
    together = model.generate(prompts, **options)
    assert together == [model.generate(prompt, **options) for prompt in prompts]
    assert together == ["".join(model.stream(prompt, **options)) for prompt in prompts]
    sampling = Sampling(temperature=1.1, seed=4)
    assert together[0] == "".join(
        continue_text(model.network, model.tokenizer, "the cat", 12, sampling, ["\n"])
    )


def test_defaults_are_those_of_the_command(model: gptpipe.Model) -> None:
    sampling = Sampling(temperature=0.8, top_k=50)
    expected = "".join(continue_text(model.network, model.tokenizer, "the", 200, sampling))
    assert model.generate("the") == expected


def test_a_text_is_scored_as_evaluate_scores_a_document(model: gptpipe.Model, toy_split: Path) -> None:
    """The first document of a split is not: nothing predicts its first token."""
    stream = open_stream(toy_split, "test")
    second = stream.documents.iloc[1]
    ids = stream.tokens[second["offset"] : second["offset"] + second["n_tokens"] - 1].tolist()
    text = model.decode(ids)
    assert model.encode(text) == ids
    scores = model.score(text)
    assert scores["n_tokens"] == len(ids) + 1
    end = model.tokenizer.end_of_text
    tokens = torch.tensor([end, *ids, end])
    nats = 0.0
    for start in range(0, len(ids) + 1, 16):  # the context of the model
        inputs, targets = tokens[start : start + 16][: len(ids) + 1 - start], tokens[start + 1 : start + 17]
        with torch.no_grad():
            log_probabilities = model.network(inputs[None])[0].log_softmax(dim=-1)
        nats -= log_probabilities.gather(1, targets[:, None]).sum().item()
    assert scores["loss"] == pytest.approx(nats / (len(ids) + 1), abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), abs=1e-5)


def test_curves_are_those_of_the_reports(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    curves = gptpipe.read_curves()
    run_id = json.loads((trained / "reports/mlflow_run.json").read_text())["run_id"]
    assert gptpipe.read_curves(run_id).equals(curves)
    assert curves.index.name == "step"
    rows = (trained / "reports/train.validations.csv").read_text().splitlines()
    column = rows[0].split(",").index("val_loss")
    expected = {int(row.split(",")[0]): float(row.split(",")[column]) for row in rows[1:]}
    assert curves["val/loss"].dropna().to_dict() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match="there is no run 'nothing'"):
        gptpipe.read_curves("nothing")


@pytest.mark.usefixtures("project")
def test_a_registered_model_is_that_of_its_folder() -> None:
    folder = tiny.make_model(Path("models/gpt"))
    assert "champion" in evaluate(tiny.params(), folder, None, 2.0)
    registered = gptpipe.load_model("models:/gpt@champion")
    assert registered.generate("the", max_new_tokens=8) == gptpipe.load_model(folder).generate(
        "the", max_new_tokens=8
    )
    assert registered.context_length == 16


def test_bad_input_is_one_clear_error(model: gptpipe.Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="temperature is -1; it must be 0 or more"):
        model.generate("the", temperature=-1)
    with pytest.raises(ConfigError, match="there is no option top_q, only max_new_tokens, temperature"):
        model.generate("the", top_q=1)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        model.generate("the", max_new_tokens=0)
    with pytest.raises(InputError, match="the text to score is empty"):
        model.score("")
    with pytest.raises(IntegrityError):
        gptpipe.load_model(tmp_path)
    with pytest.raises(ConfigError, match="neither models:/NAME@ALIAS"):
        gptpipe.load_model("models:gpt")
    with pytest.raises(IntegrityError):
        gptpipe.open_split(tmp_path)

"""The whole of stage train on a toy split: what it writes, and that no interruption shows in it."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from toy_project import Project, start, wait_for_the_lock

from gptpipe.config import Params
from gptpipe.errors import ConfigError, InputError, IntegrityError, Interrupted, NumericError, ResourceError
from gptpipe.files import verify
from gptpipe.model.gpt import GPT
from gptpipe.model.layout import load_model
from gptpipe.tokens.tokenizer import Tokenizer


@pytest.fixture
def project(tmp_path: Path, toy_split: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return Project(tmp_path, toy_split)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_split: Path
) -> tuple[Params, dict[str, str]]:
    """Parameters, and the digests of what they make when nothing happens."""
    params = tiny.params(train__optimizer=request.param, model__dropout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("undisturbed")
        patch.setenv("DVC_ROOT", str(root))
        made = Project(root, toy_split)
        made.train(params)
    return params, made.digests()


def test_what_it_writes(project: Project) -> None:
    best = project.train(tiny.params())
    model, lineage = verify(project.root / "models/gpt"), verify(project.split)
    assert model.made_from == {**lineage.made_from, "split": lineage.digest}
    assert model.counts == {"best_step": 12, "steps": 12, "tokens": 12 * 4 * 16, "parameters": 25152}
    assert sorted(model.files) == [
        "README.md", "config.json", "encoding.json", "generation_config.json", "model.safetensors", "ranks.tiktoken",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    summary = json.loads((project.root / "reports/train.json").read_bytes())
    assert summary["val"] == best
    assert best["loss"] < 5.2 < 5.6  # 300 tokens at even odds: 5.7
    steps = pd.read_csv(project.root / "reports/train.steps.csv")
    assert list(steps.columns) == ["step", "loss", "grad_norm", "lr"]
    assert steps["step"].tolist() == list(range(1, 13))
    validations = pd.read_csv(project.root / "reports/train.validations.csv")
    assert validations["step"].tolist() == [0, 4, 8, 12]
    assert validations["train_loss"].isna().tolist() == [True, False, False, False]
    assert validations["train_loss"][1] == pytest.approx(steps["loss"][:4].mean())
    assert validations["val_loss"].min() == pytest.approx(best["loss"])
    assert json.loads((project.root / "reports/mlflow_run.json").read_bytes()) == {"run_id": "run-1"}
    card = (project.root / "models/gpt/README.md").read_text()
    assert "trained from scratch" in card
    assert lineage.digest in card
    assert project.checkpoints() == []  # the results are on disk


def test_what_it_records(project: Project) -> None:
    project.train(tiny.params())
    (record,) = project.records
    assert [step for step, _, metrics in record.entries if "train/loss" in metrics] == list(range(1, 13))
    assert [step for step, _, metrics in record.entries if "val/loss" in metrics] == [0, 4, 8, 12]
    table = json.loads(record.texts["samples.json"])
    assert table["columns"] == ["step", "prompt", "continuation"]
    assert [row[:2] for row in table["data"]] == [[step, "the "] for step in (0, 4, 8, 12)]
    assert table == json.loads((project.root / "reports/train.samples.json").read_bytes())
    assert record.tagged["best_step"] == "12"
    assert record.environment["micro_batch_size"] == 4


def test_the_model_it_leaves_is_the_best_not_the_last(project: Project) -> None:
    """At a rate that ruins it, the model from before the first step is the best."""
    params = tiny.params(train__lr=3.0, train__schedule="constant", train__grad_clip=None)
    best = project.train(params)
    summary = json.loads((project.root / "reports/train.json").read_bytes())
    assert summary["best_step"] == 0
    assert {"exploding", "lr_too_high"} <= set(summary["red_flags"])
    validations = pd.read_csv(project.root / "reports/train.validations.csv")
    assert best["loss"] == pytest.approx(validations["val_loss"][0])
    model = load_model(project.root / "models/gpt")
    torch.manual_seed(params.seed)
    fresh = GPT(params.model, 300)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name))


@pytest.mark.parametrize("stop_at", [0, 3, 8, 9])
def test_an_interrupted_training_ends_like_an_undisturbed_one(
    project: Project, undisturbed: tuple[Params, dict[str, str]], stop_at: int
) -> None:
    params, digests = undisturbed
    with pytest.raises(Interrupted) as caught:
        project.train(params, stop_at=stop_at)
    assert caught.value.exit_code == 143
    assert not (project.root / "models").exists()
    assert project.checkpoints()[-1] == f"step-{stop_at:08d}"
    project.train(params)
    assert project.digests() == digests
    first, second = project.records
    assert second.run_id == first.run_id
    assert [step for step, _, metrics in second.entries if "train/loss" in metrics] == list(range(1, 13))
    sent = {(step, key): (time_ms, value) for step, time_ms, m in first.entries for key, value in m.items()}
    again = {(step, key): (time_ms, value) for step, time_ms, m in second.entries for key, value in m.items()}
    assert sent.items() <= again.items()  # replayed with the same times


def test_kill_9_at_random_moments_leaves_no_trace(project: Project, undisturbed: tuple[Params, dict[str, str]]) -> None:
    """Also during recovery: the moments spread over training, saving and the writing of the results."""
    params, digests = undisturbed
    rng = np.random.default_rng(os.getpid())
    process = start(params, project)
    n_killed = 0
    while n_killed < 6 and wait_for_the_lock(project, process):
        process.join(float(rng.uniform(0, 0.4)))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        n_killed += 1
        process = start(params, project)
    process.join(30)
    assert process.exitcode == 0
    assert n_killed >= 1
    assert project.digests() == digests
    verify(project.root / "models/gpt")
    assert project.checkpoints() == []
    assert not list(project.root.rglob("*.partial"))


def test_a_signal_ends_it_in_time_with_the_state_saved(project: Project) -> None:
    params = tiny.params(train__max_steps=100_000, train__save_every=100_000, train__eval_every=100_000)
    process = start(params, project)
    assert wait_for_the_lock(project, process)
    process.join(0.5)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
    assert [name for name in project.checkpoints() if name.startswith("step-")]


def test_a_second_training_of_the_same_run_is_refused(project: Project) -> None:
    params = tiny.params(train__max_steps=100_000, train__eval_every=100_000)
    process = start(params, project)
    assert wait_for_the_lock(project, process)
    try:
        with pytest.raises(ResourceError, match=f"process {process.pid} trains here already"):
            project.train(params)
    finally:
        process.kill()
        process.join()


def test_a_resumed_training_keeps_its_micro_batches(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little memory is free by then."""
    with pytest.raises(Interrupted):
        project.train(tiny.params(), stop_at=4)
    monkeypatch.setattr("gptpipe.training.runtime.free_bytes", lambda _: 0)
    project.train(tiny.params())
    assert project.records[1].environment["micro_batch_size"] == 4


def test_patience_ends_it_early(project: Project) -> None:
    params = tiny.params(
        train__lr=3.0, train__schedule="constant", train__grad_clip=None, train__eval_every=1, train__patience=2
    )
    project.train(params)
    assert json.loads((project.root / "reports/train.json").read_bytes())["steps"] == 2


def test_a_numeric_error_leaves_the_last_good_checkpoint(project: Project) -> None:
    params = tiny.params(train__lr=1e38, train__schedule="constant", train__grad_clip=None, train__warmup_steps=6,
                         train__eval_every=100, train__save_every=1)  # fmt: skip
    with pytest.raises(NumericError) as caught:
        project.train(params)
    assert caught.value.exit_code == 6
    assert not (project.root / "models").exists()


def start_from(project: Project) -> str:
    project.train(tiny.params())
    (project.root / "models/gpt").rename(project.root / "first")
    return str(project.root / "first")


def test_it_can_start_from_a_model(project: Project) -> None:
    folder = start_from(project)
    before = json.loads((project.root / "reports/train.json").read_bytes())["val"]["loss"]
    project.train(tiny.params(train__init_from=folder, train__max_steps=4))
    validations = pd.read_csv(project.root / "reports/train.validations.csv")
    assert validations["val_loss"][0] == pytest.approx(before, rel=1e-5)
    assert f"trained from the weights in `{folder}`" in (project.root / "models/gpt/README.md").read_text()


def test_it_does_not_start_from_a_model_for_other_tokens(project: Project, tmp_path: Path) -> None:
    """A vocabulary of the same size, and two of its tokens the other way round."""
    folder = Path(start_from(project))
    (folder / "manifest.json").unlink()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["vocab"] |= {"a": content["model"]["vocab"]["b"], "b": content["model"]["vocab"]["a"]}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="its tokens are not those of this split"):
        project.train(tiny.params(train__init_from=str(folder)))
    path.write_text("[]")
    with pytest.raises(InputError, match="not a tokenizer"):
        project.train(tiny.params(train__init_from=str(folder)))


def test_a_warm_up_beyond_the_epochs_is_told(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"train\.warmup_steps 100 must be below the 36 steps"):
        project.train(tiny.params(train__epochs=1.0, train__max_steps=None, train__warmup_steps=100))


def test_a_damaged_split_is_never_trained_on(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.split, tmp_path / "split")
    project.split = tmp_path / "split"
    path = project.split / "train/tokens.npy"
    content = bytearray(path.read_bytes())
    content[500] ^= 4
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        project.train(tiny.params())
    assert project.records == []


def test_the_tokenizer_travels_with_the_model(project: Project) -> None:
    project.train(tiny.params())
    ours, theirs = Tokenizer.load(project.split / "tokenizer"), Tokenizer.load(project.root / "models/gpt")
    assert theirs.encode("the naïve café") == ours.encode("the naïve café")

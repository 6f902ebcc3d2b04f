"""Fine-tuning and extending through DVC: what `dvc repro` notices, keeps and repeats."""

import json
import shutil
from pathlib import Path

import pytest
from toy_pipeline import copy_project, documents, run, set_params

from gptpipe.base.files import sha256_of
from gptpipe.base.manifest import new_folder, read_manifest

pytestmark = pytest.mark.slow


def test_a_model_is_fine_tuned_on_new_text_and_a_replaced_folder_is_noticed(project_copy: Path) -> None:
    """Its shape and its tokens come from the folder, although params.yaml has others."""
    base = project_copy / "data/start/base"
    shutil.copytree(project_copy / "models/gpt", base)
    (project_copy / "data/sources/animals.txt").write_text(documents().replace("walked", "ran"))
    start = {"tokenize.encoding": "data/start/base", "train.init_from": "data/start/base"}
    set_params(project_copy, {**start, "model.n_layer": 3, "tokenize.vocab_size": 280})
    run(project_copy, "dvc", "repro")
    model = project_copy / "models/gpt"
    assert (model / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (model / "ranks.tiktoken").read_bytes() == (base / "ranks.tiktoken").read_bytes()
    digest = sha256_of(base / "model.safetensors")
    assert read_manifest(model).made_from["init_from/model.safetensors"] == digest
    assert "data/start/base" in (project_copy / "reports/report.html").read_text()
    assert run(project_copy, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."

    with new_folder(base, {}) as new:
        for path in model.iterdir():
            if path.name != "manifest.json":
                shutil.copy(path, new.path)
    changed = json.loads(run(project_copy, "dvc", "status", "--json").stdout)
    assert {"tokenize", "train"} <= changed.keys()


def test_a_training_starts_from_the_champion_and_the_record_names_its_version(project_copy: Path) -> None:
    before = sha256_of(project_copy / "models/gpt/model.safetensors")
    champion = "'models:/gpt@champion'"
    set_params(project_copy, {"tokenize.encoding": champion, "train.init_from": champion, "train.max_steps": 4})
    run(project_copy, "dvc", "repro", "train")
    assert read_manifest(project_copy / "models/gpt").made_from["init_from/model.safetensors"] == before
    assert "trained from the weights in models:/gpt/1" in (project_copy / "models/gpt/README.md").read_text()
    assert run(project_copy, "dvc", "status", "train").stdout.strip() == "Data and pipelines are up to date."


def test_the_own_output_is_refused_before_the_stage_trains(project_copy: Path) -> None:
    set_params(project_copy, {"train.init_from": "models/gpt"})
    result = run(project_copy, "dvc", "repro", check=False)
    assert result.returncode == 255
    assert "models/gpt is the output of stage train" in result.stdout + result.stderr


def test_a_finished_training_is_extended_from_the_state_that_dvc_keeps(
    project_copy: Path, tmp_path: Path
) -> None:
    """Also after the checkpoints are gone and the state has come from a remote. The result is that of a
    training with the larger number of steps from the start.
    """
    set_params(project_copy, {"train.schedule": "wsd"})
    run(project_copy, "dvc", "repro")
    assert not list((project_copy / ".gptpipe/checkpoints").glob("[!.]*"))
    run(project_copy, "dvc", "remote", "add", "-d", "storage", str(tmp_path / "remote"))
    run(project_copy, "dvc", "push")
    shutil.rmtree(project_copy / ".dvc/cache")
    shutil.rmtree(project_copy / "models/state")
    shutil.rmtree(project_copy / ".gptpipe/state")
    run(project_copy, "dvc", "pull")
    direct = tmp_path / "direct"
    copy_project(project_copy, direct)
    shutil.copytree(project_copy / "models/state", project_copy / ".gptpipe/state")
    set_params(project_copy, {"train.max_steps": 9})
    set_params(direct, {"train.max_steps": 9})
    extended = run(project_copy, "dvc", "repro", "train")
    assert "train: continues from step 4 of" in extended.stdout + extended.stderr
    output = run(direct, "dvc", "repro", "train")
    assert "continues from" not in output.stdout + output.stderr
    for name in ("models/gpt/model.safetensors", "reports/train.steps.csv", "reports/train.validations.csv"):
        assert (project_copy / name).read_bytes() == (direct / name).read_bytes()
    (notes, _) = json.loads((project_copy / "reports/train.json").read_bytes())["changed_settings"]
    assert notes.startswith("after step 4: continued from run ")

"""DVC can apply the settings of every recipe, and params.yaml accepts them."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from gptpipe.collect.params import CollectParams
from gptpipe.model.gpt import GPT
from gptpipe.params import load_params

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("filters", ["", "web"])
@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.sh")), ids=lambda path: path.stem)
def test_a_recipe_sets_parameters_that_exist(recipe: Path, tmp_path: Path, filters: str) -> None:
    """bash runs the recipe with a fake `dvc` that only records its arguments."""
    (tmp_path / "dvc").write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > arguments\n')
    (tmp_path / "dvc").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", recipe], cwd=tmp_path, env={**os.environ, "PATH": path, "FILTERS": filters}, check=True
    )
    command, run, *settings = (tmp_path / "arguments").read_text().split("\0")[:-1]
    assert (command, run, set(settings[::2])) == ("exp", "run", {"-S"})
    before = shutil.copy(ROOT / "params.yaml", tmp_path)
    apply_overrides(before, settings[1::2])
    changed = load_params(tmp_path / "params.yaml")
    assert changed.collect.sources != load_params(ROOT / "params.yaml").collect.sources
    if recipe.stem == "your-text":
        section = changed.collect.filters.model_dump()
        assert all(section.values()) if filters else not any(section.values())
    if recipe.stem == "gpt2-124m":
        with torch.device("meta"):
            assert GPT(changed.model, 50257).n_parameters() == 124_439_808  # as published
        assert changed.train.launcher == "torchrun --standalone --nproc-per-node=8"
    if recipe.stem == "tinystories":
        assert changed.train.max_steps is None
        assert changed.collect.sources[0].max_bytes == 200_000_000


def test_the_loader_accepts_the_sources_in_the_documentation() -> None:
    block = re.findall(r"```yaml\n(collect:.*?)```", (ROOT / "docs/your-data.md").read_text(), re.DOTALL)[0]
    block = block.replace('sha256: "..."', f"sha256: {'ab' * 32}")
    block = block.replace('revision: "..."', f"revision: {'ab' * 20}")
    sources = YAML(typ="safe", pure=True).load(block)["collect"]["sources"]
    params = CollectParams.model_validate_json(
        json.dumps({**load_params().collect.model_dump(), "sources": sources})
    )
    kinds = {source.kind for source in params.sources}
    assert kinds == {"text", "jsonl", "parquet", "url", "huggingface", "python-docs", "python-code"}

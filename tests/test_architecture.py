"""The structure of the code: packages import only lower layers; a list names the code that affects a stage."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gptpipe.base import code
from gptpipe.base.code import STAGE_CODE, code_digest

ROOT = Path(__file__).parents[1]
STAGES = tuple(STAGE_CODE)

# From bottom to top: a package may only import packages that stand before it in this list.
LAYERS = (
    *(
        "shell",
        "base",
        "formats",
        "collect",
        "tokenize",
        "harness",
        "split",
        "model",
        "score",
        "record",
        "train",
        "evaluate",
        "serve",
    ),
    *("interface", "params", "commands", "stages"),
)
# (importer, imported) pairs that the layers would allow, and that are forbidden.
FORBIDDEN = {("model", "formats"), ("model", "collect"), ("train", "record"), ("train", "collect")}
# Packages that affect no result, see gptpipe/base/code.py.
WITHOUT_EFFECT = {"shell", "record", "serve", "interface", "commands", "params", "stages"}


def project_files() -> list[Path]:
    return sorted([*(ROOT / "gptpipe").rglob("*.py"), *(ROOT / "stages").glob("*.py")])


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all imports of a file, at its top and inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(name: str) -> str:
    """The package of a module: `train` for gptpipe.train.loop, `stages` for stages.train."""
    parts = name.split(".")
    return "stages" if parts[0] == "stages" else parts[1]


def imported_packages(path: Path) -> set[str]:
    names = imported_modules(path) - {"gptpipe.__version__"}
    return {package_of(name) for name in names if name.startswith("gptpipe.")}


def module_files(name: str) -> Iterator[Path]:
    """The files that run when a module of the project is imported: its own and those of its parent packages."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:i])
        yield from (p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file())


def needed_packages(start: Path) -> set[str]:
    """The packages that a module imports, directly or indirectly, and that affect a result."""
    reached: set[Path] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for name in imported_modules(path):
            if name.startswith("gptpipe.") and package_of(name) not in WITHOUT_EFFECT:
                waiting += module_files(name)
    packages = {package_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in reached}
    return packages - WITHOUT_EFFECT - {"__init__"}


def pipeline() -> dict:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())


@pytest.mark.parametrize("path", project_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_imports_from_lower_layers_only(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if name == "gptpipe.__init__":
        assert imported_packages(path) == {"interface"}  # for type checkers, and when it is first used
        return
    importer = package_of(name)
    for package in imported_packages(path) - {importer}:
        assert LAYERS.index(package) < LAYERS.index(importer), f"{name} imports {package}"
        assert (importer, package) not in FORBIDDEN


def test_only_record_evaluate_and_commands_import_mlflow() -> None:
    importers = {
        path.relative_to(ROOT).parts[1]
        for path in project_files()
        if any(name.split(".")[0] == "mlflow" for name in imported_modules(path))
    }
    assert importers == {"record", "evaluate", "commands"}


@pytest.mark.parametrize("stage", ["collect", "tokenize", "split"])
def test_data_stages_run_without_importing_torch_and_mlflow(tmp_path: Path, stage: str) -> None:
    """The input of the stage is missing, so it makes all its imports and then stops with an error."""
    params = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(
        params.replace("- kind: python-docs", "- {kind: text, paths: [missing]}")
    )
    script = f"""
import runpy, sys
sys.argv = ["stages.{stage}"]
try:
    runpy.run_module("stages.{stage}", run_name="__main__")
except SystemExit as end:
    print(end.code, sorted({{"torch", "mlflow", "transformers"}} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    exit_code, _, imported = result.stdout.strip().partition(" ")
    assert exit_code in ("3", "4")
    assert imported == "[]"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_code_lists_what_the_stage_imports(stage: str) -> None:
    assert set(STAGE_CODE[stage]) == needed_packages(ROOT / "stages" / f"{stage}.py")


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_yaml_lists_the_code_of_each_stage(stage: str) -> None:
    dependencies = {
        name for name in pipeline()["stages"][stage]["deps"] if name.startswith(("gptpipe", "stages"))
    }
    assert dependencies == {f"gptpipe/{package}" for package in STAGE_CODE[stage]} | {f"stages/{stage}.py"}


def test_the_code_digest_of_a_stage_changes_only_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in {package for packages in STAGE_CODE.values() for package in packages} | WITHOUT_EFFECT:
        (tmp_path / package / "deep").mkdir(parents=True)
        (tmp_path / package / "deep" / "module.py").write_text("1\n")
    monkeypatch.setattr(code, "_PACKAGE", tmp_path)

    def digests() -> dict[str, str]:
        code_digest.cache_clear()
        return {stage: code_digest(stage) for stage in STAGES}

    try:
        before = digests()
        for package in WITHOUT_EFFECT:
            (tmp_path / package / "deep" / "module.py").write_text("2\n")
        for stray in ("module.py~", ".module.py.swp", "#module.py#", "__pycache__/module.cpython-311.pyc"):
            (tmp_path / "base" / stray).parent.mkdir(exist_ok=True)
            (tmp_path / "base" / stray).write_text("x")
        assert digests() == before
        (tmp_path / "score" / "deep" / "module.py").write_text("2\n")
        after = digests()
        assert {stage for stage in STAGES if after[stage] != before[stage]} == {"train", "evaluate"}
    finally:
        code_digest.cache_clear()


def test_dvc_yaml_has_at_most_120_lines() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 120


def test_every_section_of_params_belongs_to_a_stage() -> None:
    """An experiment that changes a key of no stage would silently change nothing."""
    declared = {name for stage in pipeline()["stages"].values() for name in stage["params"] if "." not in name}
    assert declared == set(YAML(typ="safe").load((ROOT / "params.yaml").read_text()))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_script_is_short(stage: str) -> None:
    assert len((ROOT / "stages" / f"{stage}.py").read_text().splitlines()) <= 50

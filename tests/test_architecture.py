"""The structure of the code: packages import downwards only, and one list says which code decides a stage's result."""

import ast
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

# From the bottom up. A package imports packages above it in this list only.
LAYERS = (
    *("shell", "base", "formats", "collect", "tokenize", "split", "model", "score", "record", "train", "evaluate"),
    *("params", "commands", "stages"),
)
# Packages that must not know each other, although the layers would allow it.
STRANGERS = {("model", "formats"), ("model", "collect"), ("train", "record"), ("train", "collect")}
# They change no result of a stage: see gptpipe/base/code.py.
WITHOUT_EFFECT = {"shell", "record", "commands", "params", "stages"}


def project_files() -> list[Path]:
    return sorted([*(ROOT / "gptpipe").rglob("*.py"), *(ROOT / "stages").glob("*.py")])


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(name: str) -> str:
    """`train` for gptpipe.train.loop, `stages` for stages.train."""
    parts = name.split(".")
    return "stages" if parts[0] == "stages" else parts[1]


def imported_packages(path: Path) -> set[str]:
    names = imported_modules(path) - {"gptpipe.__version__"}
    return {package_of(name) for name in names if name.startswith("gptpipe.")}


def module_files(name: str) -> Iterator[Path]:
    """Files that importing a module of the project runs: its packages' and its own."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:i])
        yield from (p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file())


def needed_packages(start: Path) -> set[str]:
    """Packages that decide a result and that a module imports, directly or not."""
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported_modules(path):
            if name.startswith("gptpipe.") and package_of(name) not in WITHOUT_EFFECT:
                waiting += module_files(name)
    packages = {package_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in seen}
    return packages - WITHOUT_EFFECT - {"__init__"}


def pipeline() -> dict:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())


@pytest.mark.parametrize("path", project_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_imports_from_lower_layers_only(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if name == "gptpipe.__init__":
        assert imported_packages(path) == set()
        return
    here = package_of(name)
    for package in imported_packages(path) - {here}:
        assert LAYERS.index(package) < LAYERS.index(here), f"{name} imports {package}"
        assert (here, package) not in STRANGERS


def test_only_record_evaluate_and_commands_import_mlflow() -> None:
    importers = {
        path.relative_to(ROOT).parts[1]
        for path in project_files()
        if any(name.split(".")[0] == "mlflow" for name in imported_modules(path))
    }
    assert importers == {"record", "evaluate", "commands"}


@pytest.mark.parametrize("stage", ["collect", "tokenize", "split"])
def test_data_stages_start_without_torch_and_mlflow(stage: str) -> None:
    script = f"""
import runpy, sys
sys.argv = ["stages.{stage}"]
try:
    runpy.run_module("stages.{stage}", run_name="__main__")
except SystemExit:
    pass
print(sorted({{"torch", "mlflow", "transformers"}} & set(sys.modules)))
"""
    # In an empty folder the stage imports everything, then ends for want of its input.
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_of_a_stage_is_what_it_imports(stage: str) -> None:
    assert set(STAGE_CODE[stage]) == needed_packages(ROOT / "stages" / f"{stage}.py")


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_reruns_a_stage_for_its_code(stage: str) -> None:
    described = {name for name in pipeline()["stages"][stage]["deps"] if name.startswith(("gptpipe", "stages"))}
    assert described == {f"gptpipe/{package}" for package in STAGE_CODE[stage]} | {f"stages/{stage}.py"}


def test_the_digest_of_a_stage_changes_with_its_code_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_dvc_yaml_fits_on_two_screens() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 120


def test_every_parameter_belongs_to_a_stage() -> None:
    """A key that no stage declares would make an experiment that changes nothing, silently."""
    declared = {name for stage in pipeline()["stages"].values() for name in stage["params"] if "." not in name}
    assert declared == set(YAML(typ="safe").load((ROOT / "params.yaml").read_text()))


def test_every_parameter_is_explained() -> None:
    """A comment on every key of params.yaml, on its line or, for a section or a list, above its items."""
    for line in (ROOT / "params.yaml").read_text().splitlines():
        if line.startswith(" ") and ":" in line.split("#")[0]:
            assert "#" in line


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_script_is_short(stage: str) -> None:
    assert len((ROOT / "stages" / f"{stage}.py").read_text().splitlines()) <= 45

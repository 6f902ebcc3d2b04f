"""The structure that design promises: who imports whom, and that dvc.yaml knows what each stage reads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
STAGES = ("collect", "tokenize", "split", "train", "evaluate")

# From the ground up: a room may import rooms of a lower floor, and of its own room.
FLOORS = [
    {"errors", "__init__"},
    {"environment"},
    {"files", "config", "console", "markdown"},
    {"parquet", "parallel", "stage"},
    {"corpus", "model"},
    {"tokens"},
    {"evaluation"},
    {"training", "tracking"},
    {"cli", "stages"},
]
# Rooms of different floors that must not know each other all the same.
STRANGERS = {("model", "tokens"), ("model", "corpus"), ("tokens", "model")}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, at its head or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_files(name: str) -> list[Path]:
    """Files that importing a module of the project runs: its packages' and its own."""
    parts = name.split(".")
    found = []
    for i in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:i])
        found += [p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()]
    return found


def closure(start: Path) -> set[str]:
    """Files of the project that a module needs, itself included, relative to the root."""
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            for name in imported_modules(path):
                if name.split(".")[0] in ("gptpipe", "stages"):
                    waiting += module_files(name)
    return {path.relative_to(ROOT).as_posix() for path in seen}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "stages" if parts[0] == "stages" else parts[1]


def project_files() -> list[Path]:
    return sorted([*(ROOT / "gptpipe").rglob("*.py"), *(ROOT / "stages").glob("*.py")])


def pipeline() -> dict:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())


@pytest.mark.parametrize("path", project_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_imports_from_lower_floors_only(path: Path) -> None:
    level = {room: i for i, floor in enumerate(FLOORS) for room in floor}
    here = room_of(path)
    assert here in level, f"{here} has no floor: give it one in FLOORS"
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "gptpipe" and len(parts) > 1 and parts[1] in level and parts[1] != here:
            assert level[parts[1]] < level[here] or parts[1] in ("errors", "__init__"), f"{here} imports {name}"
            assert (here, parts[1]) not in STRANGERS


def test_only_tracking_imports_mlflow() -> None:
    importers = {
        room_of(path) for path in project_files() if any(n.split(".")[0] == "mlflow" for n in imported_modules(path))
    }
    assert importers == {"tracking"}


@pytest.mark.parametrize("stage", ["collect", "tokenize", "split"])
def test_data_stages_start_without_torch_and_mlflow(stage: str) -> None:
    code = f"import stages.{stage}, sys; print(sorted({{'torch', 'mlflow', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_knows_every_module_that_a_stage_imports(stage: str) -> None:
    described = pipeline()["stages"][stage]
    code = {dep for dep in described["deps"] if dep.endswith(".py")}
    needed = closure(ROOT / "stages" / f"{stage}.py")
    if stage == "evaluate":  # registered as a file, not imported
        needed |= closure(ROOT / "gptpipe/tracking/served_model.py")
    assert code == needed


def test_every_parameter_belongs_to_a_stage() -> None:
    """A key that no stage declares would make an experiment that changes nothing, without a word."""
    declared = {name for stage in pipeline()["stages"].values() for name in stage["params"] if "." not in name}
    assert declared == set(YAML(typ="safe").load((ROOT / "params.yaml").read_text()))


def test_every_parameter_is_explained() -> None:
    """A comment on every key of params.yaml, on its line or, for a section or a list, above its items."""
    bare = [line for line in (ROOT / "params.yaml").read_text().splitlines()
            if ":" in line.split("#")[0] and "#" not in line and line[0] == " "]  # fmt: skip
    assert bare == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_script_is_short(stage: str) -> None:
    assert len((ROOT / "stages" / f"{stage}.py").read_text().splitlines()) <= 45

"""A whole project with tiny parameters and a dozen documents made here, run as a user would."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SECTIONS = {
    "collect.sources": '[{kind: text, paths: ["data/sources/*.txt"], document: separator, separator: "\\n\\n\\n"}]',
    "tokenize.vocab_size": 300,
    "split.val_fraction": 0.3,
    "split.test_fraction": 0.3,
    "model.context_length": 16,
    "model.n_layer": 1,
    "model.n_embd": 16,
    "model.n_inner": 32,
    "train.stride": 16,
    "train.batch_size": 2,
    "train.warmup_steps": 2,
    "train.max_steps": 6,
    "train.eval_every": 3,
    "train.save_every": 3,
    "train.sample_tokens": 4,
    "evaluate.max_new_tokens": 4,
    "evaluate.continuation_tokens": 4,
}
MADE = ("data/raw", "data/tokens", "data/split", "models/gpt", "reports/eval.json", "reports/train.json",
        "reports/train.steps.csv", "reports/train.validations.csv", "reports/samples.md")  # fmt: skip


def documents() -> str:
    """A dozen documents of some sentences each, different from one another."""
    animals = ["cat", "dog", "owl", "fox", "cow", "hen", "bee", "ant", "eel", "emu", "yak", "elk"]
    places = ["garden", "river", "forest", "valley"]
    return "\n\n\n".join(
        " ".join(
            f"On day {day} the {animal} walked from the {places[day % 4]} to the {places[i % 4]}." for day in range(6)
        )
        for i, animal in enumerate(animals)
    )


def environment() -> dict[str, str]:
    """Ours, with the interpreter of the tests first on the path and nothing of an outer DVC or MLflow."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "GPTPIPE_"))}
    return {**outer, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{outer['PATH']}", "OMP_NUM_THREADS": "1"}


def run(project: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def make_project(folder: Path) -> Path:
    """A clone of this project, as committed or not, with tiny parameters and a corpus of its own."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    made = {"dvc.lock", *(f"reports/{name}.json" for name in ("split", "eval", "train", "mlflow_run"))}
    for name in sorted(set(listed.stdout.splitlines()) - made):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "data/sources/animals.txt").write_text(documents())
    for arguments in (["init", "-q"], ["config", "user.email", "t@example.com"], ["config", "user.name", "t"]):
        run(folder, "git", *arguments)
    set_params(folder, SECTIONS)
    commit(folder)
    return folder


def set_params(project: Path, values: dict[str, object]) -> None:
    """Change values of params.yaml, its comments kept."""
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text())
    for name, value in values.items():
        section, key = name.split(".")
        params[section][key] = yaml.load(value) if isinstance(value, str) else value
    with (project / "params.yaml").open("w") as file:
        yaml.dump(params, file)


def commit(project: Path) -> None:
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "state")


def digests(project: Path) -> dict[str, str]:
    """SHA-256 of all that the stages make and that must not differ between two runs."""
    files = [file for name in MADE for file in sorted([project / name, *(project / name).rglob("*")]) if file.is_file()]
    return {file.relative_to(project).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

"""A whole project with tiny parameters and a dozen generated documents, run as a user runs it."""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SECTIONS = {
    "collect.sources": (
        '[{kind: text, paths: ["data/sources/*.txt"], document: separator, separator: "\\n\\n\\n"}]'
    ),
    "collect.dedup": "exact",  # the documents resemble each other
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
    # These import packages that take seconds.
    "evaluate.continuation_documents": 0,
    "evaluate.check_transformers": False,
}
# Outputs of the stages that must not differ between two runs.
REPRODUCIBLE = (
    "data/raw",
    "data/tokens",
    "data/split",
    "models/gpt",
    "reports/eval.json",
    "reports/train.json",
    "reports/train.steps.csv",
    "reports/train.validations.csv",
    "reports/samples.md",
)
# Columns of MLflow's store that contain absolute paths.
PATHS_IN_STORE = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def documents() -> str:
    """A dozen different documents of six sentences each."""
    animals = ["cat", "dog", "owl", "fox", "cow", "hen", "bee", "ant", "eel", "emu", "yak", "elk"]
    places = ["garden", "river", "forest", "valley"]

    def document(i: int, animal: str) -> str:
        walks = ((day, places[day % 4], places[i % 4]) for day in range(6))
        return " ".join(
            f"On day {day} the {animal} walked from the {start} to the {end}." for day, start, end in walks
        )

    return "\n\n\n".join(document(i, animal) for i, animal in enumerate(animals))


def environment() -> dict[str, str]:
    """The environment of a project's commands: the tests' interpreter is first in PATH, no setting leaks in."""
    outer = {
        key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "GPTPIPE_"))
    }
    return {
        **outer,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{outer['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


def run(project: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command, cwd=project, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def make_project(folder: Path) -> Path:
    """A copy of this project, with uncommitted changes, tiny parameters and its own corpus; committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    outputs = {"dvc.lock", "reports/metrics.json"}
    for name in sorted(set(listed.stdout.splitlines()) - outputs):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "data/sources/animals.txt").write_text(documents())
    for arguments in (["init", "-q"], ["config", "user.email", "t@example.com"], ["config", "user.name", "t"]):
        run(folder, "git", *arguments)
    set_params(folder, SECTIONS)
    commit(folder)
    return folder


def copy_project(project: Path, target: Path) -> Path:
    """Copy a project and let MLflow's store refer to the artifacts of the copy."""
    shutil.copytree(project, target, symlinks=True)
    if (target / "mlflow.db").exists():
        with closing(sqlite3.connect(target / "mlflow.db")) as database, database:
            for table, column in PATHS_IN_STORE:
                change = f"update {table} set {column} = replace({column}, ?, ?)"
                database.execute(change, (f"{project}/", f"{target}/"))
    return target


def set_params(project: Path, values: dict[str, object]) -> None:
    """Change values of params.yaml and keep its comments."""
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
    """SHA-256 of each file that must not differ between two runs."""
    paths = [path for name in REPRODUCIBLE for path in [project / name, *sorted((project / name).rglob("*"))]]
    files = [path for path in paths if path.is_file()]
    return {
        file.relative_to(project).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def finished_runs(project: Path) -> set[str]:
    """The ids of the runs in the store that ended well."""
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        return {row[0] for row in database.execute("select run_uuid from runs where status = 'FINISHED'")}

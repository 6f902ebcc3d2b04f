"""Two commits trained with the same parameters: do they give the same losses and weights, to the bit?

    python -m benchmarks.same_loss REV REV
    python -m benchmarks.same_loss HEAD $(git stash create)     # uncommitted changes against their commit
    python -m benchmarks.same_loss HEAD~1 HEAD -S train.optimizer=adamw -S model.architecture=gpt2

A refactoring must change neither. Each commit runs its own collect, tokenize, split and train in a temporary
git worktree, with a small network on the embedded corpus, about a minute each. Prints whether data, losses and
weights are equal, or the first step that differs, and the seconds of stage train. The exit code is 1 if
anything differs.
"""

import argparse
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
STAGES = ("collect", "tokenize", "split", "train")
N_STEPS = 100
SETTING: dict[str, Any] = {
    "collect.dedup": "exact",  # near takes longer
    "tokenize.vocab_size": 1024,
    "model.context_length": 64,
    "model.n_layer": 2,
    "model.n_embd": 64,
    "model.n_inner": 128,
    "train.stride": 64,
    "train.max_steps": N_STEPS,
    "train.warmup_steps": 10,
    "train.eval_every": 50,
    "train.save_every": 50,
    "train.sample_tokens": 8,
}


@dataclass(frozen=True)
class Outcome:
    """What a commit's training left."""

    data: dict[str, str]  # side of the split -> SHA-256 of its tokens
    steps: pd.DataFrame  # reports/train.steps.csv, as text
    validations: pd.DataFrame  # reports/train.validations.csv, as text
    weights: str  # SHA-256
    seconds: float  # of stage train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REV", help="a commit, branch or tag")
    parser.add_argument(
        "-S", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="a parameter"
    )
    options = parser.parse_args()
    yaml = YAML(typ="safe", pure=True)
    changes = {key: yaml.load(value) for key, _, value in (change.partition("=") for change in options.changes)}
    outcomes = []
    for revision in options.revisions:
        with worktree(revision) as project:
            set_params(project, {**SETTING, **changes}, revision)
            outcomes.append(train(project))
        print(f"{revision}: stage train took {outcomes[-1].seconds:.1f} s", flush=True)
    lines, is_same = compare(*outcomes)
    print("\n".join(lines))
    return 0 if is_same else 1


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary git worktree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        added = subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", str(project), revision],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if added.returncode:
            sys.exit(
                f"error: {revision}: {added.stderr.strip().splitlines()[-1]}; name a commit of this project"
            )
        try:
            yield project
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(project)], cwd=ROOT, check=True)


def set_params(project: Path, values: dict[str, Any], revision: str) -> None:
    """Change values of params.yaml. A key that this commit does not have is left out, and named."""
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text())
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        holder = params[section] if section else params
        if key in holder:
            holder[key] = value
        else:
            print(f"{revision}: has no parameter {name}")
    with (project / "params.yaml").open("w") as file:
        yaml.dump(params, file)


def train(project: Path) -> Outcome:
    """Run the stages of a project up to train, with its own code."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))
    }
    environment |= {"PYTHONPATH": str(project), "GPTPIPE_VERBOSITY": "quiet"}
    for stage in STAGES:
        started = time.perf_counter()
        command = [sys.executable, "-m", f"stages.{stage}"]
        subprocess.run(command, cwd=project, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    streams = sorted(project.glob("data/split/*/tokens.npy"))
    return Outcome(
        {stream.parent.name: sha256(stream) for stream in streams},
        pd.read_csv(project / "reports/train.steps.csv", dtype=str),
        pd.read_csv(project / "reports/train.validations.csv", dtype=str),
        sha256(project / "models/gpt/model.safetensors"),
        seconds,
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(first: Outcome, second: Outcome) -> tuple[list[str], bool]:
    """Lines that say what is equal, and whether everything is.

    Numbers are compared as the text that Python writes for them, which is exact.
    """
    is_same_data = first.data == second.data
    lines = [f"data: {'the same tokens' if is_same_data else 'other tokens, so the losses differ anyway'}"]
    differences = []
    for name, one, other in (
        ("steps", first.steps, second.steps),
        ("validations", first.validations, second.validations),
    ):
        difference = first_difference(one, other)
        differences.append(difference)
        lines.append(f"{name}: {difference or f'all {len(one)} are equal to the bit'}")
    is_same_model = first.weights == second.weights
    lines.append(f"weights: {'equal to the bit' if is_same_model else 'different'}")
    return lines, is_same_data and is_same_model and not any(differences)


def first_difference(one: pd.DataFrame, other: pd.DataFrame) -> str | None:
    """The first row in which two curves differ, and how; None if they are equal. Only common columns count."""
    names = [name for name in one.columns if name in other.columns and name != "step"]
    for first, second in zip(one.to_dict("records"), other.to_dict("records"), strict=False):
        if first["step"] != second["step"]:
            return f"step {first['step']} against step {second['step']}"
        differing = [name for name in names if not _is_equal(first[name], second[name])]
        if differing:
            values = (f"{name} {first[name]} against {second[name]}" for name in differing)
            return f"step {first['step']} is the first that differs: {', '.join(values)}"
    if len(one) != len(other):
        return (
            f"equal to the bit in the first {min(len(one), len(other))}, then {len(one)} against {len(other)}"
        )
    return None


def _is_equal(one: Any, other: Any) -> bool:
    is_missing = [isinstance(value, float) and math.isnan(value) for value in (one, other)]
    return all(is_missing) or (not any(is_missing) and one == other)


if __name__ == "__main__":
    sys.exit(main())

"""What must hold after a fault and a rerun. Uses none of the project's own code, which may be what is broken.

The promises. Trials report their numbers:

I1  Every visible artefact has the SHA-256 of its manifest.
I2  After any fault, a rerun gives the same bytes and the same metric history as an undisturbed run.
I4  No process, no held lock and no partial file is left behind.
I5  The exit code and one line of text describe the failure. There is no traceback.
I7  After the rerun there are one FINISHED run and one registered version, and no step was trained twice.

I3 (documents are counted, and none is on two sides) follows from I2, because the manifest contains the counts.
I6 (no code in data is executed) and I8 (bounded memory) have separate tests.
"""

import hashlib
import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign.project import Ended

# These contain times, run ids, or facts about this machine. The card says so if the record did not answer.
_VARYING = (
    "reports/report.html",
    "reports/model_card.md",
    "reports/mlflow_run.json",
    "reports/metrics.json",
)
_MADE = ("data/raw", "data/tokens", "data/split", "models", "reports")
_TIMED = "train/tokens_per_second"  # its values differ, its steps do not
CODES = {"SIGINT": {130, -2}, "SIGTERM": {143, -15}, "SIGKILL": {-9}}


def artefacts(project: Path) -> dict[str, str]:
    """SHA-256 of each file made by the stages that must be equal in two runs."""
    files = [file for name in _MADE for file in sorted((project / name).rglob("*")) if file.is_file()]
    names = {file.relative_to(project).as_posix(): file for file in files}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in names.items()
        if name not in _VARYING
    }


def broken_promises_of_files(
    project: Path, expected: dict[str, str], left: frozenset[str] = frozenset()
) -> list[str]:
    """I2, I1, I4 for files: differences from an undisturbed run, and files that only it may leave (`left`)."""
    found = artefacts(project)
    different = [
        f"I2: {name}: "
        f"{'missing' if name not in found else 'unexpected' if name not in expected else 'other bytes'}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    return [
        *different[:5],
        *unsound(project),
        *(f"I4: left behind: {name}" for name in sorted(leftovers(project) - left)),
    ]


def unsound(project: Path) -> list[str]:
    """I1: visible folders that differ from their manifest."""
    broken = []
    of_data, of_models = project.glob("data/*/manifest.json"), project.glob("models/*/manifest.json")
    for manifest in sorted(of_data) + sorted(of_models):
        folder = manifest.parent
        if folder.name.startswith("."):
            continue
        try:
            entries = json.loads(manifest.read_bytes())["files"]
        except (ValueError, KeyError) as error:
            broken.append(f"I1: {manifest.relative_to(project)}: not readable: {error}")
            continue
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        if names != {*entries, "manifest.json"}:
            broken.append(f"I1: {folder.relative_to(project)}: other files than in its manifest")
        for name in sorted(names & entries.keys()):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entries[name]["sha256"]:
                broken.append(f"I1: {folder.relative_to(project)}/{name}: differs from its manifest")
    return broken


def leftovers(project: Path) -> frozenset[str]:
    """I4: names of files that may exist only while a stage runs, or before it is resumed."""
    folders = [project / name for name in ("data", "models", "reports", ".gptpipe")]
    paths = [path for folder in folders for path in folder.rglob("*")] + list(project.glob(".*.partial"))
    return frozenset(path.relative_to(project).as_posix() for path in paths if _is_left_over(path))


def _is_left_over(path: Path) -> bool:
    is_state = path.is_dir() and re.fullmatch(r"(step|best)-\d+", path.name)
    is_unsent = "outbox" in path.parts and ".jsonl" in path.suffixes
    return bool(path.name.endswith((".partial", ".done", ".lock")) or is_state or is_unsent)


@dataclass(frozen=True)
class Recorded:
    """The part of MLflow's store that must be equal after any fault."""

    runs: list[str]  # statuses of runs, without FAILED ones, which stay as a record of the error
    metrics: dict[tuple[str, int], list[float]]  # (key, step) -> values, of these runs
    models: list[str]  # statuses of logged models
    versions: list[str]  # statuses of registered versions
    aliases: dict[str, str]
    artifacts: list[str]  # names of files, without ids

    @classmethod
    def read(cls, project: Path) -> "Recorded":
        store = project / "mlflow.db"
        if not store.exists():
            return cls([], {}, [], [], {}, [])
        with closing(sqlite3.connect(store)) as database:

            def rows(query: str) -> list[Any]:
                return database.execute(query).fetchall()

            metrics: dict[tuple[str, int], list[float]] = {}
            counted = "from runs where lifecycle_stage = 'active' and status != 'FAILED'"
            query = f"""select key, step, value from metrics
                        where key not like 'system/%' and run_uuid in (select run_uuid {counted})"""
            for key, step, value in sorted(rows(query)):
                metrics.setdefault((key, step), []).append(0.0 if key == _TIMED else value)
            runs = sorted(status for (status,) in rows(f"select status {counted}"))
            return cls(
                runs,
                metrics,
                [
                    str(status)
                    for (status,) in rows("select status from logged_models where lifecycle_stage='active'")
                ],
                [
                    status
                    for (status,) in rows("select status from model_versions where current_stage != 'Deleted'")
                ],
                dict(rows("select alias, version from registered_model_aliases")),
                _artifact_names(project, [run for (run,) in rows(f"select run_uuid {counted}")]),
            )


def _artifact_names(project: Path, runs: list[str]) -> list[str]:
    """Without MLflow's own temporary files: a kill leaves some, under names that nothing reads."""
    folders = [project / "mlartifacts" / run / "artifacts" for run in runs]
    files = [(folder, path) for folder in folders for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder).as_posix() for folder, path in files]
    return sorted(name for name in names if ".artifact.uploading." not in name)


def broken_promises_of_the_record(project: Path, expected: Recorded) -> list[str]:
    """I2 for the metric history, I7 for runs, logged models and registered versions."""
    try:
        found = Recorded.read(project)
    except sqlite3.Error as error:
        return [f"I2: mlflow.db: {error}"]
    broken = []
    for name, promise in (
        ("runs", "I7"),
        ("models", "I7"),
        ("versions", "I7"),
        ("aliases", "I7"),
        ("artifacts", "I2"),
    ):
        is_value, should_be = getattr(found, name), getattr(expected, name)
        if is_value != should_be:
            shown = f"{_minus(is_value, should_be)} more, {_minus(should_be, is_value)} missing"
            if name != "artifacts":
                shown = f"{is_value}, not {should_be}"
            broken.append(f"{promise}: {name} in MLflow: {shown}")
    keys = found.metrics.keys() | expected.metrics.keys()
    different = sorted(key for key in keys if found.metrics.get(key) != expected.metrics.get(key))
    if different:
        name, step = different[0]
        values, should_be = found.metrics.get(different[0]), expected.metrics.get(different[0])
        broken.append(
            f"I2: metric history: {len(different)} of {len(keys)} points differ; "
            f"{name} at step {step} is {values}, not {should_be}"
        )
    return broken


def _minus(left: list[str], right: list[str]) -> list[str]:
    return sorted((Counter(left) - Counter(right)).elements())[:4]


def broken_promises_of_an_end(ended: Ended, codes: set[int]) -> list[str]:
    """I5: the exit code and the output of a process. I4: processes that it left running."""
    broken = []
    last = (ended.said.strip().splitlines() or ["nothing said"])[-1][:300]
    if ended.code not in codes:
        broken.append(f"I5: exit code {ended.code}, not {' or '.join(map(str, sorted(codes)))}: {last}")
    if "Traceback" in ended.said or "Exception ignored" in ended.said:
        raised = re.findall(
            r"^[\w.]+(?:Error|Exception|Interrupt|Exit|Timeout|Stopped)\b.*", ended.said, re.MULTILINE
        )
        where = re.findall(r'File "[^"]*?(?:/gptpipe/|/)([\w/]+\.py)", line (\d+)', ended.said)
        places = ", ".join(f"{file}:{line}" for file, line in where[-2:])
        broken.append(f"I5: a traceback: {(raised or [last])[-1][:200]} ({places})")
    errors = [line for line in ended.said.splitlines() if line.startswith("error:")]
    if 0 < ended.code < 128 and len(errors) != 1:
        broken.append(f"I5: {len(errors)} lines of error for exit code {ended.code}: {last}")
    if ended.orphans:
        broken.append(f"I4: {len(ended.orphans)} processes left behind")
    return broken

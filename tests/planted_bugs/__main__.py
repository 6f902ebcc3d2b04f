"""Plant each bug in a copy of the project, run its tests there, and print which bugs they caught."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from .bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]
_SECONDS = 600  # limit for the tests of one bug


def copy_project(folder: Path) -> Path:
    left_out = shutil.ignore_patterns(
        ".git",
        ".dvc",
        ".venv",
        "__pycache__",
        ".*_cache",
        ".gptpipe",
        "mlartifacts",
        "mlflow.db*",
    )
    return Path(shutil.copytree(ROOT, folder, ignore=left_out))


def plant(bug: Bug, project: Path) -> None:
    """Put `new` in the place of `old`. Raises ValueError unless `old` occurs exactly once."""
    path = project / bug.file
    text = path.read_text(encoding="utf-8")
    if (n := text.count(bug.old)) != 1:
        raise ValueError(f"{bug.name}: the code to change occurs {n} times in {bug.file}")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def outcome_of(bug: Bug, project: Path) -> tuple[str, str]:
    """`caught`, `survived` or the reason why neither is known; and the first test that failed."""
    sound = (project / bug.file).read_text(encoding="utf-8")
    plant(bug, project)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *bug.tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(project)}
    try:
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "caught", "the tests do not end"
    finally:
        (project / bug.file).write_text(sound, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 1 and failed and not failed[0].startswith("ERROR"):
        return "caught", failed[0].removeprefix("FAILED ").partition(" - ")[0]
    if done.returncode == 0:
        return "survived", ""
    return "the tests did not run", (failed or done.stdout.splitlines() or done.stderr.splitlines() or [""])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted_bugs", description=__doc__)
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of bugs tried at the same time, each in its own copy"
    )
    parser.add_argument("--only", help="try only bugs whose name contains this text")
    options = parser.parse_args()
    chosen = [bug for bug in BUGS if (options.only or "") in bug.name]
    started, n_caught = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        projects: Queue[Path] = Queue()
        for i in range(options.jobs):
            projects.put(copy_project(Path(folder) / str(i)))

        def one(bug: Bug) -> tuple[str, str]:
            project = projects.get()
            try:
                return outcome_of(bug, project)
            finally:
                projects.put(project)

        with ThreadPoolExecutor(options.jobs) as threads:
            print("| planted bug | outcome | caught by |\n|---|---|---|")
            for bug, (what, by) in zip(chosen, threads.map(one, chosen), strict=True):
                n_caught += what == "caught"
                print(f"| {bug.name} | {what} | {by} |", flush=True)
    print(f"\n{n_caught} of {len(chosen)} caught, {time.monotonic() - started:,.0f} s with {options.jobs} jobs")
    return n_caught != len(chosen)


if __name__ == "__main__":
    sys.exit(main())

"""Trials with real processes: `dvc repro`, `dvc exp run`, and a stage whose parent is killed.

Each takes seconds to a minute, so a campaign has few of them. Each starts in a project in which nothing has
run.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from toy_pipeline import commit, documents, environment, make_project, run

from campaign.checks import (
    Recorded,
    artefacts,
    broken_promises_of_files,
    broken_promises_of_the_record,
    leftovers,
    unsound,
)
from campaign.project import TINY, set_params

Trial = dict[str, Any]
_EXPERIMENT = ("-S", "train.lr=1e-3")
_ENOUGH = 120  # seconds; the limit for a process that must end
_SECOND_WRITER = 8  # seconds, with the start of Python, within which a second writer must name the first


class State(NamedTuple):
    """The content of a project after undisturbed runs."""

    files: dict[str, str]
    record: Recorded
    left: frozenset[str]


def _state(project: Path) -> State:
    return State(artefacts(project), Recorded.read(project), leftovers(project))


class RealProjects:
    """A project before its first run, and the results of an undisturbed run and of an experiment on it."""

    def __init__(self, folder: Path, reproduced: Path | None = None) -> None:
        """`reproduced`: a project of `make_project` after `dvc repro`, if there is one already."""
        self.folder = folder
        (folder / "fresh").mkdir()
        self.fresh = make_project(folder / "fresh")
        self.seconds = 12.0  # the time that `dvc repro` takes
        if reproduced is None:
            set_params(self.fresh, TINY)
            commit(self.fresh)
            reproduced = self.copy()
            started = time.monotonic()
            run(reproduced, "dvc", "repro")
            self.seconds = time.monotonic() - started
        self.expected = _state(reproduced)
        self._experiment: State | None = None

    def copy(self, of: Path | None = None) -> Path:
        target = Path(tempfile.mkdtemp(dir=self.folder)) / "project"
        shutil.copytree(of or self.fresh, target, symlinks=True)
        return target

    @property
    def experiment(self) -> State:
        """After `dvc repro` and then an experiment, in place."""
        if self._experiment is None:
            project = self.copy()
            run(project, "dvc", "repro")
            commit(project)
            run(project, "dvc", "exp", "run", *_EXPERIMENT)
            self._experiment = _state(project)
        return self._experiment


@cache
def _projects() -> RealProjects:
    return RealProjects(Path(tempfile.mkdtemp(prefix="campaign-real-")))


def remove_projects() -> None:
    """Remove the projects that the trials of this process made."""
    if _projects.cache_info().currsize:
        shutil.rmtree(_projects().folder)
        _projects.cache_clear()


def try_out_for_real(trial: Trial, projects: RealProjects | None = None) -> dict[str, Any]:
    """Run a trial of `REAL_KINDS`; returns it with its differences."""
    projects = projects or _projects()
    started = time.monotonic()
    try:
        differences = REAL_KINDS[trial["kind"]](projects, trial)
    except (AssertionError, subprocess.TimeoutExpired, psutil.TimeoutExpired) as error:
        differences = [f"I5: {' '.join(str(error).split())[-400:]}"]
    return {"trial": trial, "differences": differences, "seconds": round(time.monotonic() - started, 2)}


def orphan(projects: RealProjects, trial: Trial) -> list[str]:
    """Kill the parent of stage collect soon after its start, and start the stage again at once.

    The corpus is so large that both would write at the same time.
    """
    with removed_after(projects.copy()) as project:
        texts = (documents().replace("day", f"day {i},") for i in range(trial.get("copies", 200)))
        (project / "data/sources/animals.txt").write_text("\n\n\n".join(texts))
        alone = projects.copy(project)
        collect = [sys.executable, "-m", "stages.collect"]
        run(alone, *collect)
        expected = artefacts(alone)
        shutil.rmtree(alone.parent)
        wait_for_child = "import subprocess, sys; subprocess.run(sys.argv[1:])"
        parent = _start(project, sys.executable, "-c", wait_for_child, *collect, DVC_STAGE="collect")
        time.sleep(trial["at"])
        children = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        differences = _until_it_runs(project, collect)
        _, alive = psutil.wait_procs(children, timeout=10)
        differences += [f"I4: process {process.pid} still runs without its parent" for process in alive]
        return differences + broken_promises_of_files(project, expected)


def _until_it_runs(project: Path, command: list[str]) -> list[str]:
    """Run a command, and repeat it while it reports that another process is writing (code 5)."""
    deadline = time.monotonic() + _ENOUGH
    while True:
        started = time.monotonic()
        ended = run(project, *command, check=False)
        seconds = time.monotonic() - started
        if ended.returncode == 0:
            return []
        words = (ended.stderr.strip().splitlines() or [""])[-1]
        # 255: the exit code of `dvc` in this case.
        if ended.returncode not in (5, 255) or time.monotonic() > deadline:
            return [f"I5: exit code {ended.returncode}: {words}"]
        if ended.returncode == 5 and seconds > _SECOND_WRITER:
            return [f"I4: the second writer waited {seconds:.0f} s: {words}"]
        time.sleep(0.5)


def repro(projects: RealProjects, trial: Trial) -> list[str]:
    """Send a signal to `dvc`, the stage or the whole group during `dvc repro`; then run `dvc repro` again."""
    with removed_after(projects.copy()) as project:
        killed = _start(project, "dvc", "repro")
        _signal(killed, trial, projects.seconds)
        differences = unsound(project) + _until_it_runs(project, ["dvc", "repro"])
        return differences + _compare(project, projects.expected)


def experiment(projects: RealProjects, trial: Trial) -> list[str]:
    """The same during an experiment in place, in a temporary workspace (`--temp`) or queued; then repeat it."""
    with removed_after(projects.copy()) as project:
        run(project, "dvc", "repro")
        commit(project)
        how = trial["how"]

        def command(name: str) -> list[str]:
            if how == "queue":
                run(project, "dvc", "exp", "run", "--queue", "-n", name, *_EXPERIMENT)
                return ["dvc", "exp", "run", "--run-all"]
            return ["dvc", "exp", "run", *(["--temp"] if how == "temp" else []), "-n", name, *_EXPERIMENT]

        killed = _start(project, *command("first"))
        _signal(killed, trial, projects.seconds)
        _wait_for_the_queue(project)
        differences = unsound(project) + _until_it_runs(project, command("again"))
        if how != "in place" and not differences:
            run(project, "dvc", "exp", "apply", "again")
        return differences + _compare(project, projects.experiment)


def _wait_for_the_queue(project: Path) -> None:
    """DVC waits forever if `--run-all` starts while a worker is about to end."""
    for _ in range(60):
        said = run(project, "dvc", "queue", "status", check=False).stdout
        if "0 active, 0 idle" in said or "Worker status" not in said:
            return
        time.sleep(1)


def two(projects: RealProjects, trial: Trial) -> list[str]:
    """Run `dvc repro` twice at the same time in one workspace: the second one is refused, or waits."""
    with removed_after(projects.copy()) as project:
        first = _start(project, "dvc", "repro")
        time.sleep(trial["at"] * projects.seconds)
        second = _start(project, "dvc", "repro")
        codes = [process.wait(_ENOUGH) for process in (first, second)]
        differences = [] if 0 in codes else [f"I4: neither of two ended well: {codes}"]
        return differences + _until_it_runs(project, ["dvc", "repro"]) + _compare(project, projects.expected)


def lock_file(projects: RealProjects, trial: Trial) -> list[str]:
    """Truncate dvc.lock, as a kill does while DVC rewrites it. `gptpipe doctor --fix` is enough to continue."""
    with removed_after(projects.copy()) as project:
        run(project, "dvc", "repro")
        path = project / "dvc.lock"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * trial["kept"])])
        run(project, sys.executable, "-m", "gptpipe.commands.cli", "doctor", "--fix", check=False)
        return _until_it_runs(project, ["dvc", "repro"]) + _compare(project, projects.expected)


def side_by_side(projects: RealProjects, _: Trial) -> list[str]:
    """Run two experiments at the same time with `--run-all -j 2`; the result of one of them is known."""
    with removed_after(projects.copy()) as project:
        run(project, "dvc", "repro")
        commit(project)
        run(project, "dvc", "exp", "run", "--queue", "-n", "known", *_EXPERIMENT)
        run(project, "dvc", "exp", "run", "--queue", "-n", "other", "-S", "train.lr=2e-3")
        run(project, "dvc", "exp", "run", "--run-all", "-j", "2")
        record = Recorded.read(project)
        differences = (
            [] if record.runs == ["FINISHED"] * 3 else [f"I7: runs in MLflow: {record.runs}, not 3 FINISHED"]
        )
        run(project, "dvc", "exp", "apply", "known")
        known = projects.experiment
        return differences + broken_promises_of_files(project, known.files, known.left)


REAL_KINDS: dict[str, Callable[[RealProjects, Trial], list[str]]] = {
    "orphan": orphan,
    "repro": repro,
    "experiment": experiment,
    "two": two,
    "lock file": lock_file,
    "side by side": side_by_side,
}


def real_trials(n: int, only: set[str], seed: int) -> list[Trial]:
    """`n` trials. Of ten: four orphans, three kills of `dvc repro`, two of experiments, one of another kind."""
    chance = random.Random(seed)
    rest = [
        {"kind": "two", "at": 0.3},
        {"kind": "lock file", "kept": 0.0},
        {"kind": "side by side"},
        {"kind": "two", "at": 0.0},
        {"kind": "lock file", "kept": 0.6},
    ]
    trials: list[Trial] = []
    for i in range(n):
        fault = {
            "signal": chance.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"]),
            "to": chance.choice(["dvc", "stage", "group"]),
            "at": round(chance.uniform(0, 0.95), 3),
        }
        if i % 10 < 4:
            trials.append({"kind": "orphan", "at": round(chance.uniform(0, 1.0), 3)})
        elif i % 10 < 7:
            trials.append({"kind": "repro", **fault})
        elif i % 10 < 9:
            trials.append({"kind": "experiment", "how": ("in place", "temp", "queue")[(i // 5) % 3], **fault})
        else:
            trials.append(rest[(i // 10) % len(rest)])
    return [trial for trial in trials if not only or trial["kind"] in only]


def _start(project: Path, *command: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start a process in its own group, so that a signal to the group does not reach this process."""
    return subprocess.Popen(
        command,
        cwd=project,
        env={**environment(), **variables},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _signal(started: subprocess.Popen[bytes], trial: Trial, seconds: float) -> None:
    """Send the signal once, and wait for the end of the process that was started."""
    time.sleep(trial["at"] * seconds)
    number = signal.Signals[trial["signal"]]
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if trial["to"] == "group":
            os.killpg(started.pid, number)
        elif trial["to"] == "dvc":
            started.send_signal(number)
        else:
            for child in psutil.Process(started.pid).children(recursive=True):
                if any(word.startswith("stages.") for word in child.cmdline()):
                    child.send_signal(number)
    started.wait(_ENOUGH)


def _compare(project: Path, expected: State) -> list[str]:
    left = [
        process.info["pid"]
        for process in psutil.process_iter(["pid", "cwd"])
        if str(process.info["cwd"] or "").startswith(str(project))
    ]
    differences = [f"I4: process {pid} is still running in the project" for pid in left]
    differences += broken_promises_of_files(project, expected.files, expected.left)
    return differences + broken_promises_of_the_record(project, expected.record)


@contextmanager
def removed_after(project: Path) -> Iterator[Path]:
    """Yields the project; removes it at the end, and kills every process that still runs in it."""
    try:
        yield project
    finally:
        for process in psutil.process_iter(["cwd"]):
            if str(process.info["cwd"] or "").startswith(str(project)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(project.parent, ignore_errors=True)

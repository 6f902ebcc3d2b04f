"""The tiny project, its states between the stages, and how a stage runs in a process forked from this one."""

import atexit
import importlib
import importlib.metadata
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from toy_pipeline import SECTIONS, documents, set_params

from campaign.faults import Counters, Fault, install

ROOT = Path(__file__).parents[2]
STAGES = ("collect", "tokenize", "split", "train", "evaluate")
SAVE_EVERY = 2  # steps
TINY = {**SECTIONS, "train.max_steps": 8, "train.eval_every": 2, "train.save_every": SAVE_EVERY}
SHARD_BYTES = 1500  # of text per shard, so that a dozen documents make several
_NOT_SHARED = ("stages", "code_model", "__", "campaign", "tests", "mlflow.store.db_migrations.env")
LIMIT = 60  # seconds; the limit for a run of a stage
# What a run changes in the project.
CHANGED = (
    "data/raw",
    "data/tokens",
    "data/split",
    "models",
    "reports",
    ".gptpipe",
    "mlflow.db",
    "mlflow.db-wal",
    "mlflow.db-shm",
    "mlartifacts",
    "tmp",
)


def import_modules(names: Iterable[str]) -> None:
    """Import modules once for all forks. No thread may start here, because a fork would lose it."""
    for name in sorted(names):
        if name not in sys.modules and not name.startswith(_NOT_SHARED):
            with suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)


def import_pipeline(*, trains: bool) -> None:
    """Import what the stages import at their start, and make shards smaller, so that there are several."""
    names = ["collect.collect", "collect.shards", "tokenize.encode", "split.overlap", "split.split"]
    if trains:
        names += ["record.run", "train.session", "evaluate.registry", "evaluate.report"]
    import_modules(f"gptpipe.{name}" for name in names)
    shards: Any = sys.modules["gptpipe.collect.shards"]
    shards.SHARD_BYTES = SHARD_BYTES


def remember_packages() -> None:
    """Read once which packages are installed. Each training and MLflow list them, which takes seconds."""
    for module in (importlib.metadata, sys.modules.get("importlib_metadata")):
        if module is not None:
            kind: Any = module.Distribution
            kind.metadata = _cached_by_path(kind.metadata.fget)
            for distribution in module.distributions():
                _ = distribution.metadata
    with suppress(Exception):
        importlib.import_module("mlflow.utils.requirements_utils")._init_modules_to_packages_map()


_charts: dict[str, str] = {}  # arguments -> SVG


def remember_charts() -> None:
    """Draw each chart once. Drawing takes most of the time of stage evaluate, and touches no file."""
    report: Any = sys.modules["gptpipe.evaluate.report"]
    for name in ("line_chart", "bar_chart", "error_bar_chart"):
        setattr(report, name, _cached_by_arguments(getattr(report, name)))


def _cached_by_arguments(draw: Callable[..., str]) -> Callable[..., str]:
    def drawn(*arguments: Any, **options: Any) -> str:
        key = repr((draw.__name__, arguments, options))
        if key not in _charts:
            _charts[key] = draw(*arguments, **options)
        return _charts[key]

    return drawn


def learn(path: Path) -> None:
    """Import the modules that a run of a stage imported, and keep the charts that it drew."""
    learned = json.loads(path.read_text())
    import_modules(learned["modules"])
    _charts.update(learned["charts"])


def _cached_by_path(read: Callable[[Any], Any]) -> property:
    known: dict[str, Any] = {}

    def metadata(distribution: Any) -> Any:
        path = str(getattr(distribution, "_path", id(distribution)))
        if path not in known:
            known[path] = read(distribution)
        return known[path]

    return property(metadata)


@dataclass(frozen=True)
class Ended:
    """How a process of a stage ended."""

    code: int  # negative: the signal that ended it
    said: str
    operations: int
    optimizer_steps: int
    seconds: float
    orphans: tuple[int, ...] = ()  # processes that it left behind


class TinyProject:
    """A project of a dozen documents in `folder/project`. Its states are saved in `folder/states`.

    Its path never changes, because MLflow's store contains absolute paths. All processes that it starts are
    children of this one, even if they lose their parent.
    """

    def __init__(self, folder: Path, text: str | None = None, **params: object) -> None:
        self.folder = folder.resolve()
        self.path, self.states = self.folder / "project", self.folder / "states"
        (self.path / "data/sources").mkdir(parents=True)
        for name in ("params.yaml", "dvc.yaml", ".gitignore", ".dvc/config", ".dvcignore"):
            (self.path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.path / name)
        (self.path / "data/sources/animals.txt").write_text(documents() if text is None else text)
        set_params(self.path, {**TINY, **params})
        git = ("git", "-c", "user.email=t@example.com", "-c", "user.name=t")
        for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "tiny"]):
            subprocess.run([*git, *arguments], cwd=self.path, check=True, capture_output=True)
        self.outs = _outs(self.path / "dvc.yaml")
        self.trace = self.folder / "trace"

    def save(self, state: str) -> None:
        _copy_changed(self.path, self.states / state)

    def restore(self, state: str) -> None:
        """Restore a saved state of the project, and remove what a trial left."""
        for entry in sorted(self.path.iterdir()):
            if entry.name not in (
                "params.yaml",
                "dvc.yaml",
                "data",
                ".git",
                ".gitignore",
                ".dvc",
                ".dvcignore",
            ):
                _remove(entry)
        for entry in sorted((self.path / "data").iterdir()):
            if entry.name != "sources":
                _remove(entry)
        _copy_changed(self.states / state, self.path)
        (self.path / "tmp").mkdir(exist_ok=True)
        (self.path / "reports").mkdir(exist_ok=True)

    def remove_outs(self, stage: str) -> None:
        """Remove the outputs of a stage, as DVC does before it runs the stage."""
        for name in self.outs[stage]:
            _remove(self.path / name)

    def call(self, module: str, function: str) -> Ended:
        """Call a function of the project's code without arguments, in a separate process."""
        return self._fork(lambda: getattr(importlib.import_module(module), function)(), Fault()).wait()

    def run(self, stage: str, fault: Fault | None = None, **options: Any) -> Ended:
        return self.start(stage, fault, **options).wait()

    def start(
        self,
        stage: str,
        fault: Fault | None = None,
        *,
        environment: dict[str, str] | None = None,
        trace: bool = False,
        learned: Path | None = None,
    ) -> "Running":
        """Fork a process that runs a stage as `python -m stages.NAME` would; `learn` reads `learned`."""

        def act() -> None:
            sys.argv = [f"stages/{stage}.py"]
            runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)

        return self._fork(act, fault or Fault(), environment or {}, trace, learned)

    def _fork(
        self,
        act: Callable[[], object],
        fault: Fault,
        environment: dict[str, str] | None = None,
        trace: bool = False,
        learned: Path | None = None,
    ) -> "Running":
        counters = Counters()
        said = self.folder / f"said-{time.monotonic_ns()}"
        started = time.monotonic()
        if pid := os.fork():
            return Running(pid, said, counters, started)
        code = 70
        try:
            # Until the stage begins, signals end the process at once.
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.SIG_DFL)
            os.setsid()
            self._become_a_process_of_the_project(said, environment or {})
            install(fault, self.path, counters, self.trace if trace else None)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = _run_to_the_end(act)
            if learned:
                learned.write_text(json.dumps({"modules": list(sys.modules), "charts": _charts}))
        finally:
            os._exit(code)

    def _become_a_process_of_the_project(self, said: Path, environment: dict[str, str]) -> None:
        file = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(self.path)
        os.environ |= {
            "DVC_ROOT": str(self.path),
            "TMPDIR": str(self.folder),
            "GPTPIPE_WORKERS": "1",
            **environment,
        }


class Running:
    """A forked process of a stage."""

    def __init__(self, pid: int, said: Path, counters: Counters, started: float) -> None:
        self.pid, self._said, self.counters, self._started = pid, said, counters, started
        self._status: int | None = None

    def wait_until_stopped(self) -> bool:
        """Wait until SIGSTOP has stopped the process; returns False if it ended before."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self._status = status
        return os.WIFSTOPPED(status)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait(self, *, reap_all: bool = True) -> Ended:
        """Wait for the end. Raises TimeoutError after `LIMIT` seconds and kills the process.

        `reap_all`: also wait for its orphans; possible only if no other stage runs.
        """
        while self._status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._status = status
            elif time.monotonic() - self._started > LIMIT:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self._said.unlink()
                raise TimeoutError(f"a stage took more than {LIMIT} seconds")
            else:
                time.sleep(0.002)
        seconds, code = time.monotonic() - self._started, os.waitstatus_to_exitcode(self._status)
        said = (
            self._said.read_text(errors="replace") if self._said.exists() else ""
        )  # it may be killed before it opens the file
        self._said.unlink(missing_ok=True)
        orphans = _end_orphans() if reap_all else ()
        return Ended(code, said, self.counters.operations, self.counters.optimizer_steps, seconds, orphans)

    def signal_after(self, seconds: float, *signals: str) -> None:
        """Send signals, the first after some time and each other one 50 ms later, if the process still runs."""
        time.sleep(seconds)
        for name in signals:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.Signals[name])  # no other process can have this number before wait()
            time.sleep(0.05 if len(signals) > 1 else 0)


def _end_orphans() -> tuple[int, ...]:
    """Kill the processes that a stage left behind and that do not end within 5 seconds; returns their numbers.

    They have become children of this process, which is a subreaper.
    """
    deadline = time.monotonic() + 5
    while (left := _children()) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)
    for pid in left:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return left


def _children() -> tuple[int, ...]:
    return tuple(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def _run_to_the_end(act: Callable[[], object]) -> int:
    """Run `act` and what follows it in a program, up to the end of the interpreter; returns the exit code."""
    code = _code_of(act)
    code = _code_of(threading._shutdown) or code  # type: ignore[attr-defined]
    code = _code_of(atexit._run_exitfuncs) or code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def _code_of(act: Callable[[], object]) -> int:
    try:
        act()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _outs(path: Path) -> dict[str, list[str]]:
    """The outputs of each stage, from dvc.yaml."""
    stages = YAML(typ="safe", pure=True).load(path)["stages"]
    outs: dict[str, list[str]] = {}
    for name, stage in stages.items():
        entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
        outs[name] = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
    return outs


def _copy_changed(source: Path, target: Path) -> None:
    for name in CHANGED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

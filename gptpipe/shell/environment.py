"""Environment variables: settings that change no result. Only this module reads them."""

import importlib
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from gptpipe.shell.errors import ConfigError

VERBOSITIES = ("quiet", "normal", "verbose")
_LEAST_KEY = 16  # characters of GPTPIPE_SERVE_KEY
SQLITE = "sqlite:///"  # start of the address of a SQLite database


def project_root() -> Path:
    """The main checkout, which contains the tracking store and the checkpoints.

    DVC runs `--temp` and `--queue` experiments in a temporary copy, and sets DVC_ROOT to the main checkout.
    Without DVC_ROOT, it is the nearest folder above with a `.dvc` folder, or else the current folder.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if os.path.isdir(folder / ".dvc"):  # noqa: PTH112  Path.is_dir raises an error without permission
            return folder
    return here


def is_project(folder: Path) -> bool:
    """Whether a folder is the root of a project: it has a `.dvc` folder or a `params.yaml`."""
    # Path.is_dir and Path.is_file raise an error without permission.
    return os.path.isdir(folder / ".dvc") or os.path.isfile(folder / "params.yaml")  # noqa: PTH112, PTH113


def n_workers() -> int:
    """GPTPIPE_WORKERS; by default the number of cores that this process may use."""
    text = os.environ.get("GPTPIPE_WORKERS")
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"GPTPIPE_WORKERS is {text!r}; set it to a number of processes, 1 or more")
    return int(text)


def verbosity() -> str:
    """GPTPIPE_VERBOSITY: quiet (warnings, errors, results), normal (the default), or verbose (every step)."""
    text = os.environ.get("GPTPIPE_VERBOSITY") or "normal"
    if text not in VERBOSITIES:
        raise ConfigError(f"GPTPIPE_VERBOSITY is {text!r}; set it to quiet, normal or verbose")
    return text


def uses_ray() -> bool:
    """Whether GPTPIPE_ENGINE is `ray`. The default is `local`: processes and threads of this machine."""
    engine = os.environ.get("GPTPIPE_ENGINE", "local")
    if engine not in ("local", "ray"):
        raise ConfigError(f"GPTPIPE_ENGINE is {engine!r}; set it to local or ray")
    return engine == "ray"


def limit_busy_waiting() -> None:
    """Let idle threads of OpenMP sleep soon, so that another busy process does not slow a training many times.

    Call it before torch is imported. By default, threads wait for the next parallel section in a loop, which
    keeps a core busy, for 200 ms in the runtimes of Intel and LLVM. A thread that another process has displaced
    then holds up all others. Results do not depend on it. Values of the user stay.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # iterations, under 0.1 ms; GNU's runtime
        os.environ.setdefault("KMP_BLOCKTIME", "1")  # milliseconds; the runtimes of Intel and LLVM (macOS)


class RankInfo(NamedTuple):
    """Which process of a training this is, among all of them and among those of this machine."""

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0
    n_local_ranks: int = 1


def rank_info() -> RankInfo:
    """The environment variables that torchrun sets; without torchrun, rank 0 of 1."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return RankInfo()
    return RankInfo(
        rank=int(os.environ["RANK"]),
        n_ranks=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        n_local_ranks=int(os.environ["LOCAL_WORLD_SIZE"]),
    )


def attempt() -> str:
    """How often torchrun has restarted the ranks of this training after a fault."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def optional_module(name: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"params.yaml has a value that needs `{name}`: pip install -e '.[{extra}]'"
        ) from error


def serve_key() -> str | None:
    """GPTPIPE_SERVE_KEY: the key of clients of `gptpipe serve`; None: only this machine may connect."""
    key = os.environ.get("GPTPIPE_SERVE_KEY")
    if key is None:
        return None
    if len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"GPTPIPE_SERVE_KEY must have {_LEAST_KEY} or more ASCII characters, without spaces, "
            "so that nobody guesses it; `openssl rand -hex 24` makes one"
        )
    return key


def allow_inexact() -> bool:
    """GPTPIPE_ALLOW_INEXACT=1: resume a training even if this environment cannot continue it bit for bit."""
    return os.environ.get("GPTPIPE_ALLOW_INEXACT") == "1"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI; by default the SQLite store at the project's root.

    A relative path of a SQLite store starts at the project's root, also for an experiment in a temporary copy.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return sqlite_uri(project_root() / "mlflow.db")
    path = uri.removeprefix(SQLITE)
    if not uri.startswith(SQLITE) or path.startswith(("/", ":memory:")) or not path:
        return uri
    return f"{sqlite_uri(project_root().absolute())}/{path}"


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite database. SQLAlchemy ends the path at `?`, and decodes `%` and two hex digits."""
    return SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def experiment_name() -> str:
    """MLFLOW_EXPERIMENT_NAME; by default `gptpipe`."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "gptpipe"


def provenance() -> dict[str, str]:
    """Tags that identify the code: git's commit, and in a DVC experiment also its name and its baseline commit.

    DVC commits the changes of an experiment when it ends. The name leads to that commit.
    """
    names = {"dvc.exp_name": "DVC_EXP_NAME", "dvc.baseline_rev": "DVC_EXP_BASELINE_REV"}
    tags = {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}
    head = git("rev-parse", "HEAD")
    return {**tags, "mlflow.source.git.commit": head.strip()} if head else tags


def git(*arguments: str) -> str | None:
    """Git's output; None if git is missing or fails, takes more than a minute, or its output is not UTF-8."""
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, encoding="utf-8", check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None

"""What the surroundings say: settings that change no result, all read here."""

import importlib
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from gptpipe.shell.errors import ConfigError

VERBOSITIES = ("quiet", "normal", "verbose")


def project_root() -> Path:
    """The main checkout, where the tracking store and checkpoints live.

    DVC runs `--temp` and `--queue` experiments in a copy that it removes afterwards, and names the main
    checkout in DVC_ROOT. Elsewhere it is the nearest parent that holds a `.dvc` folder.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    # os.path: a folder above that may not be entered holds none, and is no error.
    return next((folder for folder in (here, *here.parents) if os.path.isdir(folder / ".dvc")), here)  # noqa: PTH112


def n_workers() -> int:
    """GPTPIPE_WORKERS, or the number of cores that this process may use."""
    text = os.environ.get("GPTPIPE_WORKERS")
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"GPTPIPE_WORKERS is {text!r}; set it to a whole number of processes, 1 or more")
    return int(text)


def verbosity() -> str:
    """GPTPIPE_VERBOSITY: quiet (warnings, errors, results), normal, or verbose (every step as a line of its own)."""
    text = os.environ.get("GPTPIPE_VERBOSITY") or "normal"
    if text not in VERBOSITIES:
        raise ConfigError(f"GPTPIPE_VERBOSITY is {text!r}; set it to quiet, normal or verbose")
    return text


def uses_ray() -> bool:
    """GPTPIPE_ENGINE: `local` (processes and threads of this machine, also without it) or `ray`."""
    engine = os.environ.get("GPTPIPE_ENGINE", "local")
    if engine not in ("local", "ray"):
        raise ConfigError(f"GPTPIPE_ENGINE is {engine!r}; set it to local or ray")
    return engine == "ray"


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
    """Which start of a training by torchrun this is; it may start the ranks again after a fault."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def optional_module(name: str, extra: str) -> ModuleType:
    """A module that an extra brings. Raises ConfigError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"params.yaml asks for what needs `{name}`: pip install -e '.[{extra}]'") from error


def allow_inexact() -> bool:
    """GPTPIPE_ALLOW_INEXACT=1: resume a training although it cannot be bit-exact in this environment."""
    return os.environ.get("GPTPIPE_ALLOW_INEXACT") == "1"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite store at the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def experiment_name() -> str:
    """MLFLOW_EXPERIMENT_NAME, or `gptpipe`."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "gptpipe"


def provenance() -> dict[str, str]:
    """Where the code comes from: git's revision, and DVC's name of the experiment and the revision that it starts from.

    In an experiment the workspace has changes beside the revision; its own commit, which DVC makes at the end, is
    found by the name.
    """
    names = {"dvc.exp_name": "DVC_EXP_NAME", "dvc.baseline_rev": "DVC_EXP_BASELINE_REV"}
    tags = {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}
    head = git("rev-parse", "HEAD")
    return {**tags, "mlflow.source.git.commit": head.strip()} if head else tags


def git(*arguments: str) -> str | None:
    """Git's output; None if there is no git, it fails, does not answer in a minute, or prints what is not UTF-8."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None

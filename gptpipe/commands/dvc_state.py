"""Checks of the files that DVC keeps: a kill or a merge can leave them so that every later `dvc` command fails.

Each check returns a sentence or raises; with `fix` it repairs what can be repaired without loss.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dvc.rwlock import SCHEMA as RWLOCK_SCHEMA
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils.serialize import YAMLFileCorruptedError, parse_yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from gptpipe.base.files import write_bytes
from gptpipe.shell.errors import IntegrityError, ResourceError, first_line

LOCK = Path("dvc.lock")
_STATUS_SECONDS = 600


def check_lock(*, fix: bool) -> str:
    """dvc.lock has the form that DVC reads. Fixing moves it aside; `dvc repro` writes it again with the same bytes."""
    if not LOCK.exists():
        return "no dvc.lock yet; `dvc repro` writes it"
    try:
        COMPILED_LOCKFILE_SCHEMA(parse_yaml(LOCK.read_text(encoding="utf-8"), LOCK))
    except (YAMLFileCorruptedError, Invalid, UnicodeDecodeError, RecursionError) as error:
        reason = "it is empty" if not LOCK.read_bytes().strip() else first_line(error)[:100]
    else:
        return "dvc.lock can be read"
    if not fix:
        raise IntegrityError(
            f"{LOCK}: damaged ({reason}), so every dvc command fails; `gptpipe doctor --fix` moves it aside, then "
            "`dvc repro` writes it again and takes the results from DVC's cache"
        )
    aside = _unused_name(LOCK)
    LOCK.rename(aside)
    return f"moved the damaged {LOCK} to {aside}; `dvc repro` writes it again"


def _unused_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in range(1000))
    return next(name for name in names if not name.exists())


def check_rwlock(*, fix: bool) -> str:
    """DVC's list of paths in use can be read. Only call this while no dvc process runs here."""
    path = Path(".dvc/tmp/rwlock")
    if not path.exists():
        return "none"
    try:
        in_use = RWLOCK_SCHEMA(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, Invalid, RecursionError):
        problem = "damaged, so every dvc command that writes fails"
    else:
        if not any(in_use.values()):
            return "none"
        problem = "names paths in use, but no dvc process runs here"
    if not fix:
        raise ResourceError(f"{path}: {problem}; `gptpipe doctor --fix` removes it")
    path.unlink()
    return f"removed {path}: {problem}"


def check_ignored(*, fix: bool) -> str:
    """Git ignores what DVC stores; DVC writes the .gitignore files for that, and a kill can cut them."""
    missing: dict[Path, list[str]] = {}
    for out in _stored_outputs():
        file = out.parent / ".gitignore"
        lines = file.read_bytes().decode(errors="replace").splitlines() if file.exists() else []
        if f"/{out.name}" not in lines and out.exists():
            missing.setdefault(file, []).append(f"/{out.name}")
    if not missing:
        return "git ignores what DVC stores"
    files = ", ".join(map(str, missing))
    if not fix:
        lost = ", ".join(name for names in missing.values() for name in names)
        raise IntegrityError(
            f"{files}: without {lost}, so git would take in what DVC stores; `gptpipe doctor --fix` adds it"
        )
    for file, names in missing.items():
        before = file.read_bytes().decode(errors="ignore") if file.exists() else ""
        write_bytes(file, "".join(f"{line}\n" for line in [*before.splitlines(), *names]).encode())
    return f"added what was missing to {files}"


def _stored_outputs() -> list[Path]:
    """What the stages of dvc.yaml write into DVC's cache."""
    try:
        pipeline = YAML(typ="safe", pure=True).load(Path("dvc.yaml").read_bytes())
        outs = [out for stage in pipeline["stages"].values() for out in stage.get("outs", ())]
        return [Path(out) for out in outs if isinstance(out, str)]
    except FileNotFoundError:
        return []
    except (YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"dvc.yaml: cannot be read ({first_line(error)[:100]}); `git diff dvc.yaml`") from error


def check_cache(*, fix: bool) -> str:
    """Each file of the cache has the content that its name gives. DVC itself trusts files that are write-protected.

    A file that was changed in place, through a hard link in the workspace, would come back with every `dvc repro`.
    """
    files = sorted(path for path in Path(".dvc/cache/files/md5").glob("??/*") if path.is_file())
    damaged = [path for path in files if _md5(path) != path.parent.name + path.name.removesuffix(".dir")]
    if not damaged:
        return f"{len(files)} files are as their names say"
    if not fix:
        raise IntegrityError(
            f"{damaged[0]}: not the content that its name gives ({len(damaged)} such files), and DVC would restore it; "
            "`gptpipe doctor --fix` removes it from the cache, then `dvc repro` makes it again"
        )
    for path in damaged:
        path.unlink()
    return f"removed {len(damaged)} damaged files of {len(files)}; `dvc repro` makes them again"


def _md5(path: Path) -> str:
    """MD5 as DVC names files by it; empty for one that it is still writing, whose name is longer."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def changed_stages() -> list[str]:
    """What `dvc status` finds changed. Raises ResourceError where it fails."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    try:
        asked = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_STATUS_SECONDS
        )
        if asked.returncode == 0:
            return list(json.loads(asked.stdout))
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_STATUS_SECONDS} s"
    except ValueError:
        reason = "its answer is not JSON"
    raise ResourceError(f"`dvc status` fails: {reason}")


def check_workspaces(in_use: list[Path], *, fix: bool) -> str:
    """Copies of the project that killed `dvc exp run --temp` and queue workers left.

    DVC makes each from a commit and a stash entry that it keeps, and its results go to the project's cache and store,
    so nothing in a copy is unique.
    """
    exps = Path(".dvc/tmp/exps")  # `--temp` runs in exps/standalone/, the queue in exps/
    copies = sorted(path for path in [*exps.glob("tmp*"), *exps.glob("*/tmp*")] if path.is_dir())
    left = [copy for copy in copies if not any(folder.is_relative_to(copy.resolve()) for folder in in_use)]
    if not left:
        return "none"
    if not fix:
        raise UserWarning(f"{len(left)}, as {left[0]}, of killed experiments; `gptpipe doctor --fix` removes them")
    for copy in left:
        shutil.rmtree(copy)
    return f"removed {len(left)} workspaces of killed experiments"


def check_worktrees(*, fix: bool) -> str:
    """Entries of git worktrees whose folder is gone, as of a `gptpipe restore` that was removed by hand."""
    environment = {**os.environ, "LC_ALL": "C"}
    command = ["git", "worktree", "prune", "--verbose", *([] if fix else ["--dry-run"])]
    try:
        asked = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserWarning(f"git does not answer: {first_line(error)}") from error
    if asked.returncode:
        raise UserWarning(f"git does not answer: {(asked.stderr.strip().splitlines() or ['no reason given'])[0][:200]}")
    lines = (asked.stderr or asked.stdout).strip().splitlines()
    if not lines:
        return "none without their folder"
    if not fix:
        raise UserWarning(f"{len(lines)} without their folder; `gptpipe doctor --fix` removes their entries from git")
    return f"removed {len(lines)} entries without their folder"

"""Checks of `gptpipe doctor` on the files that DVC and git keep.

A kill or a merge can leave these files in a state in which every later `dvc` command fails. With `fix`, a check
repairs what can be repaired without loss.
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
from gptpipe.commands.findings import NOT_MADE, Finding, ok, problem, warning
from gptpipe.shell.errors import IntegrityError, ResourceError, first_line

LOCK = Path("dvc.lock")
_STATUS_SECONDS = 600
_GIT_SECONDS = 60


def check_lock(*, fix: bool) -> Finding:
    """DVC can read dvc.lock. Fixing moves it aside; `dvc repro` writes it again with the same bytes."""
    if not LOCK.exists():
        return ok("no dvc.lock yet; `dvc repro` writes it")
    try:
        COMPILED_LOCKFILE_SCHEMA(parse_yaml(LOCK.read_text(encoding="utf-8"), LOCK))
        return ok("dvc.lock can be read")
    except (YAMLFileCorruptedError, Invalid, UnicodeDecodeError, RecursionError) as error:
        is_empty = not LOCK.read_bytes().strip()
        reason = "it is empty" if is_empty else first_line(error)[:100]
    if not fix:
        return problem(
            IntegrityError,
            f"{LOCK}: damaged ({reason}), so every dvc command fails",
            "`gptpipe doctor --fix` moves it aside, then `dvc repro` writes it again from DVC's cache",
        )
    aside = _unused_name(LOCK)
    LOCK.rename(aside)
    return ok(f"moved the damaged {LOCK} to {aside}; `dvc repro` writes it again")


def _unused_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in range(1000))
    return next(name for name in names if not name.exists())


def check_rwlock(*, fix: bool) -> Finding:
    """DVC's list of paths in use is valid and empty. Call this only while no dvc process runs here."""
    path = Path(".dvc/tmp/rwlock")
    if not path.exists():
        return ok("none")
    try:
        in_use = RWLOCK_SCHEMA(json.loads(path.read_text(encoding="utf-8")))
        if not any(in_use.values()):
            return ok("none")
        reason = "names paths in use, but no dvc process runs here"
    except (ValueError, Invalid, RecursionError):
        reason = "damaged, so every dvc command that writes fails"
    if not fix:
        return problem(ResourceError, f"{path}: {reason}", "`gptpipe doctor --fix` removes it")
    path.unlink()
    return ok(f"removed {path}: {reason}")


def check_gitignores(*, fix: bool) -> Finding:
    """Git ignores what DVC stores. DVC writes the .gitignore files for this, and a kill can cut them short."""
    try:
        outputs = _outputs_in_cache()
    except (YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        return problem(
            IntegrityError,
            f"dvc.yaml: cannot be read ({first_line(error)[:100]})",
            "`git diff dvc.yaml` shows what changed",
        )
    missing: dict[Path, list[str]] = {}  # .gitignore -> lines
    for output in outputs:
        file = output.parent / ".gitignore"
        if output.exists() and f"/{output.name}" not in _lines(file):
            missing.setdefault(file, []).append(f"/{output.name}")
    if not missing:
        return ok("git ignores what DVC stores")
    files = ", ".join(map(str, missing))
    if not fix:
        lines = ", ".join(line for added in missing.values() for line in added)
        return problem(
            IntegrityError,
            f"{files}: without {lines}, so git would commit what DVC stores",
            "`gptpipe doctor --fix` adds it",
        )
    for file, added in missing.items():
        lines_after = [*_lines(file, errors="ignore"), *added]
        write_bytes(file, "".join(f"{line}\n" for line in lines_after).encode())
    return ok(f"added what was missing to {files}")


def _lines(file: Path, errors: str = "replace") -> list[str]:
    """The lines of a text file; none if there is no such file. `errors`: as of `bytes.decode`."""
    return file.read_bytes().decode(errors=errors).splitlines() if file.exists() else []


def _outputs_in_cache() -> list[Path]:
    """The outputs of dvc.yaml's stages that DVC keeps in its cache."""
    file = Path("dvc.yaml")
    if not file.exists():
        return []
    stages = YAML(typ="safe", pure=True).load(file.read_bytes())["stages"].values()
    outputs = [output for stage in stages for output in stage.get("outs", ())]
    return [Path(output) for output in outputs if isinstance(output, str)]  # options would make it a mapping


def check_cache(*, fix: bool) -> Finding:
    """Each file of the cache has the content whose MD5 is its name. DVC itself trusts files that are
    write-protected.

    If a file was changed through a hard link in the workspace, every `dvc repro` would restore the changed
    content.
    """
    files = sorted(path for path in Path(".dvc/cache/files/md5").glob("??/*") if path.is_file())
    damaged = [path for path in files if _md5(path) != path.parent.name + path.name.removesuffix(".dir")]
    if not damaged:
        return ok(f"{len(files)} files have the content that their names give")
    if not fix:
        mismatch = f"its content does not match its name ({len(damaged)} such files)"
        return problem(
            IntegrityError,
            f"{damaged[0]}: {mismatch}, and DVC would restore it",
            "`gptpipe doctor --fix` removes it from the cache, then `dvc repro` makes it again",
        )
    for path in damaged:
        path.unlink()
    return ok(f"removed {len(damaged)} damaged files of {len(files)}; `dvc repro` makes them again")


def _md5(path: Path) -> str:
    """A file's MD5 in hex, by which DVC names it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_pipeline(*, has_outputs: bool, other_dvc_runs: bool) -> Finding:
    """`dvc status` finds the workspace as dvc.lock describes it."""
    try:
        changed = changed_stages()
    except ResourceError as error:
        if other_dvc_runs:
            return warning(f"{error}, while another dvc command is running")
        raise
    if not changed:
        return ok("the workspace is as in dvc.lock")
    if not has_outputs:
        return NOT_MADE
    return warning(
        f"not as in dvc.lock: {', '.join(changed)}",
        "`dvc status` shows what changed, `dvc repro` runs these stages",
    )


def changed_stages() -> list[str]:
    """The stages that `dvc status` reports as changed. Raises ResourceError if the command fails."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    try:
        status = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_STATUS_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"`dvc status` fails: no answer in {_STATUS_SECONDS} s") from error
    if status.returncode:
        reason = (status.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ResourceError(f"`dvc status` fails: {reason}")
    try:
        return list(json.loads(status.stdout))
    except ValueError as error:
        raise ResourceError("`dvc status` fails: its answer is not JSON") from error


def check_workspaces(in_use: list[Path], *, fix: bool) -> Finding:
    """No copies of the project are left of killed `dvc exp run --temp` and queue workers; `in_use` are exempt.

    A copy contains nothing unique: DVC makes it from a commit and a stash entry, which it keeps, and the
    results go to the project's cache and store.
    """
    exps = Path(".dvc/tmp/exps")  # `--temp` runs in exps/standalone/, the queue in exps/
    copies = sorted(path for path in [*exps.glob("tmp*"), *exps.glob("*/tmp*")] if path.is_dir())
    unused = [copy for copy in copies if not any(folder.is_relative_to(copy.resolve()) for folder in in_use)]
    if not unused:
        return ok("none")
    if not fix:
        return warning(
            f"{len(unused)} workspaces of killed experiments, for example {unused[0]}",
            "`gptpipe doctor --fix` removes them",
        )
    for copy in unused:
        shutil.rmtree(copy)
    return ok(f"removed {len(unused)} workspaces of killed experiments")


def check_worktrees(*, fix: bool) -> Finding:
    """Every git worktree has its folder; those of `gptpipe restore` may be moved or removed by hand."""
    moved = _moved_worktrees()
    if moved and fix:  # before `prune`, which would remove their entries
        _git("worktree", "repair", *map(str, moved))
    prune = _git("worktree", "prune", "--verbose", *([] if fix else ["--dry-run"]))
    if isinstance(prune, Finding):
        return prune
    n_pruned = len(prune.strip().splitlines())
    if n_pruned and not fix:
        return warning(
            f"{n_pruned} without their folder", "`gptpipe doctor --fix` removes or repairs their entries"
        )
    if n_pruned:
        return ok(f"removed {n_pruned} entries without their folder")
    if moved:
        return ok(f"repaired {len(moved)} that were moved with this project")
    return ok("every worktree has its folder")


def _moved_worktrees() -> list[Path]:
    """Folders beside this project that git knows under an earlier path, as `gptpipe restore` makes them."""
    entries = sorted(Path(".git/worktrees").glob("*/gitdir"))
    recorded = [Path(entry.read_text(errors="surrogateescape").strip()).parent for entry in entries]
    beside = [Path.cwd().with_name(folder.name) for folder in recorded]
    return [
        folder
        for folder, old in zip(beside, recorded, strict=True)
        if folder != old and (folder / ".git").is_file() and not old.exists()
    ]


def _git(*arguments: str) -> str | Finding:
    """What a git command prints, or a warning if it fails."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_GIT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return warning(f"git does not answer: {first_line(error)}")
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[0][:200]
        return warning(f"git does not answer: {reason}")
    return result.stderr or result.stdout

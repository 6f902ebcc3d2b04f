"""Finds the local files that the globs of a source match, in a fixed order."""

import glob
import os
import re
import stat
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import InputError


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The regular files that match the globs, sorted, each once. Raises one InputError for all problems."""
    names: set[str] = set()
    problems: list[str] = []
    for pattern in patterns:
        matches, problems_of_pattern = _match(pattern)
        names.update(map(os.path.normpath, matches))
        problems += problems_of_pattern
    paths = sorted(map(Path, names))
    for path in paths:
        try:
            if stat.S_ISREG(path.stat().st_mode):
                path.open("rb").close()
            else:
                problems.append(f"{path}: not a regular file")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    if problems:
        raise InputError("; ".join(problems) + "; fix collect.sources in params.yaml, or the files")
    return paths


def is_file_name(pattern: str) -> bool:
    """Whether a pattern is the name of one file, which may contain characters of a glob, as in `a[1].txt`."""
    return not glob.has_magic(pattern) or os.path.isfile(pattern)  # noqa: PTH113  False without permission


def _match(pattern: str) -> tuple[list[str], list[str]]:
    """The names that match a glob, folders excluded, and what is wrong with the pattern or the names."""
    if glob.has_magic(pattern) and is_file_name(pattern):
        pattern = glob.escape(pattern)
    links = _links_to_folders(pattern)
    if links:
        return [], [f"{link}: a link to a folder, which could lead in circles" for link in links]
    # glob.glob, unlike Path.glob, accepts absolute patterns.
    names = [name for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir()]  # noqa: PTH207
    problems = [f"{folder}: Permission denied" for folder in _unreadable_folders(Path(pattern))]
    if not names and not problems:
        problem = "a folder, not a file" if Path(pattern).is_dir() else "no file matches"
        problems.append(f"{pattern}: {problem}")
    project = project_root().resolve()
    start = Path(re.split(r"[*?[]", pattern)[0] + "x").parent.resolve()  # the last folder before a wildcard
    for name in sorted(names):
        target = Path(os.path.realpath(name))
        if not (target.is_relative_to(project) or target.is_relative_to(start)):
            problems.append(f"{name}: a link that leads out of {start} and of the project, to {target}")
    return names, problems


def _links_to_folders(pattern: str) -> list[str]:
    """Links that `**` would follow. With a few links that point upwards, glob would practically never end."""
    before, recursive, _ = pattern.partition("**")
    if not recursive:
        return []
    links: list[str] = []
    for start in sorted(glob.glob(before or ".")):  # noqa: PTH207
        for folder, names, _ in os.walk(start):
            names[:] = sorted(name for name in names if not name.startswith("."))  # as glob does
            paths = [os.path.join(folder, name) for name in names]  # noqa: PTH118
            links += [path for path in paths if os.path.islink(path)]  # noqa: PTH114
    return links


def _unreadable_folders(pattern: Path) -> list[str]:
    """Folders that glob skips silently, because this process may not list them or go through them."""
    unreadable: set[str] = set()
    for below, above in pairwise([pattern, *pattern.parents]):
        needed = os.R_OK | os.X_OK if glob.has_magic(below.name) else os.X_OK
        folders = filter(os.path.isdir, glob.glob(str(above), recursive=True))  # noqa: PTH207
        unreadable |= {folder for folder in folders if not os.access(folder, needed)}
    return sorted(unreadable)

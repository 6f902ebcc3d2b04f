"""Finds the local files that the globs of a source match, in a fixed order."""

import glob
import os
import re
import stat
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import InputError


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The regular files that match the globs, sorted, each once. Raises one InputError for all problems.

    A file that matches under several names has the first relative one.
    """
    names: dict[str, str] = {}  # by place
    problems: list[str] = []
    for pattern in patterns:
        matches, problems_of_pattern = _match(pattern)
        for name in map(_simplified, matches):
            place = place_of(name)
            names[place] = min(names.get(place, name), name, key=lambda one: (Path(one).is_absolute(), one))
        problems += problems_of_pattern
    paths = sorted(map(Path, names.values()))
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


def place_of(name: str) -> str:
    """What all names of a file have in common: its folder, without links, and its name there.

    A link to a file is a file of its own, as a copy would be: with `cache.type symlink`, DVC links all equal
    files to one.
    """
    folder, last = os.path.split(os.path.join(os.getcwd(), name))  # noqa: PTH109, PTH118
    return os.path.join(_without_links(folder), last)  # noqa: PTH118


@lru_cache(1024)  # a folder may have a million files
def _without_links(folder: str) -> str:
    return os.path.realpath(folder)


def _simplified(name: str) -> str:
    """The name without `.` and `..`. Where `..` leaves a folder that is a link, it becomes absolute."""
    short = os.path.normpath(name)
    return short if place_of(short) == place_of(name) else place_of(name)


def is_file_name(pattern: str) -> bool:
    """Whether a pattern is the name of one file, which may contain characters of a glob, as in `a[1].txt`."""
    return not glob.has_magic(pattern) or os.path.isfile(pattern)  # noqa: PTH113  False without permission


def _match(pattern: str) -> tuple[list[str], list[str]]:
    """The names that match a glob, folders excluded, and what is wrong with the pattern or the names."""
    escaped = _with_escaped_names(pattern)
    links = _links_to_folders(escaped)
    if links:
        return [], [f"{link}: a link to a folder, which could lead in circles" for link in links]
    # glob.glob, unlike Path.glob, accepts absolute patterns.
    matches = glob.glob(escaped, recursive=True)  # noqa: PTH207
    names = [name for name in matches if not Path(name).is_dir()]
    problems = [f"{folder}: Permission denied" for folder in _unreadable_folders(Path(escaped))]
    if not names and not problems:
        inside = f"a folder, not a file; {pattern.rstrip('/')}/**/* matches the files in it"
        problems.append(f"{pattern}: {inside if matches else 'no file matches'}")
    project = project_root().resolve()
    start = Path(re.split(r"[*?[]", escaped)[0] + "x").parent.resolve()  # the last folder before a wildcard
    for name in sorted(names):
        target = Path(os.path.realpath(name))
        if not (target.is_relative_to(project) or target.is_relative_to(start)):
            problems.append(f"{name}: a link that leads out of {start} and of the project, to {target}")
    return names, problems


def _with_escaped_names(pattern: str) -> str:
    """The pattern with the characters of a glob escaped where they are in the name of a file or folder.

    In `x[1]/*`, that is the first part, if there is such a folder.
    """
    if os.path.lexists(pattern):
        return glob.escape(pattern)
    parts = list(Path(pattern).parts)
    n_folders = 0
    while n_folders < len(parts) and _is_folder(parts[: n_folders + 1]):
        n_folders += 1
    return str(Path(*map(glob.escape, parts[:n_folders]), *parts[n_folders:]))


def _is_folder(parts: list[str]) -> bool:
    return os.path.isdir(Path(*parts))  # noqa: PTH112  False for a name that is too long


def _links_to_folders(pattern: str) -> list[str]:
    """Links that `**` would follow. With a few links that point upwards, glob would practically never end."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return []
    before = Path(*parts[: parts.index("**")])
    links: list[str] = []
    for start in sorted(glob.glob(str(before))):  # noqa: PTH207
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

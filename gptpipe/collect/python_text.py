"""Documentation and code of Python's standard library, which every machine already has, and of installed packages.

Pure Python modules are read, never imported. Only modules compiled into the interpreter are asked for their objects.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from gptpipe.shell.errors import InputError

# No documentation of the language: test suites, vendored code, and demos.
_LEFT_OUT = {"__pycache__", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}


def python_docs(package: str | None = None) -> Iterator[str]:
    """Help topics of the language, then docstrings, one text each, in the order of names; of a package no topics.

    A topic that half stands in another is left out: whichever side it was on, the other side would hold that text.

    Without the objects' names: many objects share a docstring (aliases, wrappers, inherited methods), and under a name
    of its own each would pass exact deduplication and could stand on two sides of a split.
    """
    if package is None:
        yield from _whole_topics(importlib.import_module("pydoc_data.topics").topics)
    for path in module_files(package):
        yield from _module_file(path)
    for name in sorted(sys.builtin_module_names) if package is None else ():
        yield from _compiled_module(name)


def _whole_topics(topics: dict[str, str]) -> Iterator[str]:
    """Those of which none that stays, and is longer, holds half; headings differ, so paragraphs are compared."""
    kept: dict[str, set[str]] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        parts = set(topics[name].split("\n\n"))
        if all(2 * sum(map(len, parts & other)) < sum(map(len, parts)) for other in kept.values()):
            kept[name] = parts
    yield from (topics[name] for name in sorted(kept))


def python_code(package: str | None = None) -> Iterator[str]:
    """Modules, one text each, in the order of names; those that say a wrong encoding are passed over."""
    for path in module_files(package):
        with suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:
            yield file.read()


def module_files(package: str | None) -> list[Path]:
    """The files of a package, or of the standard library, without tests. Raises InputError."""
    roots: Sequence[str] = [sysconfig.get_path("stdlib")]
    if package is not None:
        spec = importlib.util.find_spec(package)
        roots = [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]
    files = {path for root in map(Path, roots) for path in ([root] if root.suffix == ".py" else root.rglob("*.py"))
             if not _LEFT_OUT.intersection(path.relative_to(root).parts)}  # fmt: skip
    if not files:
        raise InputError(f"collect.sources: no Python package {package} is here; install it, or name another")
    return sorted(files)


def _module_file(path: Path) -> Iterator[str]:
    """Docstrings of a module and of what it defines, in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings are not our user's concern
        try:
            module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # the library holds files that are wrong on purpose
            return
    yield from _docstrings(module)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child)


def _compiled_module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for _, value in [("", module), *sorted(vars(module).items())]:
        members = [member for _, member in sorted(vars(value).items())] if inspect.isclass(value) else []
        for documented in (value, *members):
            text = getattr(documented, "__doc__", None)
            # Compiled things only: a library may have put a function of its own here, as in sys.excepthook.
            kinds = (inspect.ismodule, inspect.isclass, inspect.isbuiltin, inspect.ismethoddescriptor)
            if isinstance(text, str) and text and any(is_kind(documented) for is_kind in kinds):
                yield inspect.cleandoc(text)

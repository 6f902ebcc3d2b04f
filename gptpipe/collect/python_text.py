"""Documentation and code of Python's standard library, which every machine has, and of installed packages.

Modules in Python are read, never imported. Only modules that are compiled into the interpreter are imported.
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

# Folders without documentation of the language: test suites, vendored code, and demos.
_EXCLUDED = {"__pycache__", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}


def python_docs(package: str | None = None) -> Iterator[str]:
    """Help topics of the language (only without `package`), then docstrings, in the order of names.

    Names of objects are left out. Many objects share a docstring (aliases, wrappers, inherited methods). With
    different names, exact deduplication would keep all of them, and they could be on different sides of a
    split.
    """
    if package is None:
        yield from _distinct_topics(importlib.import_module("pydoc_data.topics").topics)
    for path in module_files(package):
        yield from _module_file(path)
    if package is None:
        for name in sorted(sys.builtin_module_names):
            yield from _compiled_module(name)


def _distinct_topics(topics: dict[str, str]) -> Iterator[str]:
    """The topics, except those of which at least half is in a longer topic: that text could be on another side.

    Paragraphs are compared, because headings differ.
    """
    kept: dict[str, set[str]] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        parts = set(topics[name].split("\n\n"))
        if all(2 * sum(map(len, parts & other)) < sum(map(len, parts)) for other in kept.values()):
            kept[name] = parts
    yield from (topics[name] for name in sorted(kept))


def python_code(package: str | None = None) -> Iterator[str]:
    """Modules, one text each, in the order of names; modules that declare a wrong encoding are skipped."""
    for path in module_files(package):
        with suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:
            yield file.read()


def module_files(package: str | None) -> list[Path]:
    """The files of a package, or of the standard library, without tests. Raises InputError."""
    roots: Sequence[str] = [sysconfig.get_path("stdlib")]
    if package is not None:
        spec = importlib.util.find_spec(package)
        roots = [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]
    files: set[Path] = set()
    for root in map(Path, roots):
        paths = [root] if root.suffix == ".py" else root.rglob("*.py")
        files.update(path for path in paths if not _EXCLUDED.intersection(path.relative_to(root).parts))
    if not files:
        raise InputError(
            f"collect.sources: Python package {package} is not installed; install it, or name another"
        )
    return sorted(files)


def _module_file(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes, methods and functions, in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in the library's code
        try:
            module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # the library contains files that are wrong on purpose
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
    """Docstrings of a module that is compiled into the interpreter, its classes, methods and functions."""
    module = importlib.import_module(name)
    for _, value in [("", module), *sorted(vars(module).items())]:
        members = [member for _, member in sorted(vars(value).items())] if inspect.isclass(value) else []
        for documented in (value, *members):
            text = getattr(documented, "__doc__", None)
            # Compiled objects only: a library may have replaced one by its own function, as sys.excepthook.
            kinds = (inspect.ismodule, inspect.isclass, inspect.isbuiltin, inspect.ismethoddescriptor)
            if isinstance(text, str) and text and any(is_kind(documented) for is_kind in kinds):
                yield inspect.cleandoc(text)

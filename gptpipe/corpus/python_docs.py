"""The standard library's own documentation: real English text that every machine already has.

Pure Python modules are parsed, never imported. Only modules compiled into the interpreter are asked for their objects.
"""

import ast
import importlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# No documentation of the language: test suites, vendored code, and demos.
_LEFT_OUT = {"__pycache__", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}


def python_docs() -> Iterator[str]:
    """Help topics, then docstrings, one text each, in the order of names.

    Without the objects' names: many objects share a docstring (aliases, wrappers, inherited methods), and under a name
    of its own each would pass exact deduplication and could stand on two sides of a split.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name]
    standard_library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(standard_library.rglob("*.py")):
        if not _LEFT_OUT.intersection(path.relative_to(standard_library).parts):
            yield from _module_file(path)
    for name in sorted(sys.builtin_module_names):
        yield from _compiled_module(name)


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

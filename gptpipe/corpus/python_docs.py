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
    """Help topics, then each documented object as `name(arguments)`, a blank line, docstring; in the order of names.

    A docstring that objects share (an alias, a wrapper, an inherited method) is given once, under the first name:
    under two names it would pass exact deduplication and could stand on two sides of a split.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name]
    seen: set[str] = set()
    for heading, docstring in _documented_objects():
        if docstring not in seen:
            seen.add(docstring)
            yield f"{heading}\n\n{docstring}"


def _documented_objects() -> Iterator[tuple[str, str]]:
    standard_library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(standard_library.rglob("*.py")):
        relative = path.relative_to(standard_library)
        if not _LEFT_OUT.intersection(relative.parts):
            yield from _module_file(path, ".".join(relative.with_suffix("").parts).removesuffix(".__init__"))
    for name in sorted(sys.builtin_module_names):
        yield from _compiled_module(name)


def _module_file(path: Path, name: str) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings are not our user's concern
        try:
            module = ast.parse(path.read_bytes())
        except SyntaxError:  # the library holds files that are wrong on purpose
            return
    if text := ast.get_docstring(module):
        yield name, text
    yield from _definitions(module, name)


def _definitions(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{node.name}"
        if text := ast.get_docstring(node):
            parts: list[ast.AST] = [*node.bases] if isinstance(node, ast.ClassDef) else [node.args]
            yield f"{name}({', '.join(map(ast.unparse, parts))})", text
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, name)


def _compiled_module(name: str) -> Iterator[tuple[str, str]]:
    module = importlib.import_module(name)
    if module.__doc__:
        yield name, inspect.cleandoc(module.__doc__)
    for key, value in sorted(vars(module).items()):
        yield from _compiled_object(value, f"{name}.{key}")
        if inspect.isclass(value):
            for member_name, member in sorted(vars(value).items()):
                yield from _compiled_object(member, f"{name}.{key}.{member_name}")


def _compiled_object(value: object, name: str) -> Iterator[tuple[str, str]]:
    text = getattr(value, "__doc__", None)
    if isinstance(text, str) and text and (inspect.isroutine(value) or inspect.isclass(value)):
        signature = getattr(value, "__text_signature__", None) or "(...)"
        yield f"{name}{signature.replace('$', '')}", inspect.cleandoc(text)

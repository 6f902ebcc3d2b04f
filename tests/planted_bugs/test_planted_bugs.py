"""The list of planted bugs is up to date: the code that each changes exists, and so do its tests."""

import ast
from pathlib import Path

import pytest

from planted_bugs.bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_has_its_place_and_its_tests(bug: Bug) -> None:
    text = (ROOT / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.old) == 1
    ast.parse(text.replace(bug.old, bug.new))  # it must be caught by a test, not by the compiler
    for test in bug.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).exists()
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_names_differ() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 25

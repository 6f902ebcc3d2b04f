"""Keys of objects in objects."""

from typing import Any

import pytest

from gptpipe.collect.keys import MISSING, paths_of_keys, value_at


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"b": {"c": "x"}}},
        {"a.b": {"c": "x"}},
        {"a": {"b.c": "x"}},
        {"a.b.c": "x", "a": {"b": {"c": "y"}}},
    ],
)
def test_each_path_that_is_listed_leads_to_its_value(value: dict[str, Any]) -> None:
    """A key with a dot was once listed as `a.b.c` and not found as that."""
    assert "a.b.c" in set(paths_of_keys(value))
    assert value_at(value, "a.b.c") == "x"


@pytest.mark.parametrize(
    "value", [{}, [], "a", {"a": None}, {"a": {"b": "c"}}, {"a": {"b": {}}}, {"a.b": ["c"]}]
)
def test_other_paths_have_no_value(value: Any) -> None:
    assert value_at(value, "a.b.c") is MISSING

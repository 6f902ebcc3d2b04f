"""Any params.yaml either loads or is rejected with one line for each error."""

import copy
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gptpipe.collect.params import FilterParams
from gptpipe.params import Params, load_params
from gptpipe.shell.errors import ConfigError

SHIPPED: dict[str, Any] = YAML(typ="safe").load(Path(__file__).parents[2].joinpath("params.yaml").read_bytes())
# Values near the limits of the schema, and of every YAML type.
EDGES = (
    *(None, True, False, 0, 1, -1, 2, 64, 2**31, 2**63, 2**64, 10**30, 0.0, -0.0, 0.5, 1.0, 1e-05, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "yes",
        "null",
        "1e-05",
        "auto",
        "gpt2",
        "none",
        "\u001b[31m",
        "a\nb",
        "\ud83d\ude00",
    ),
    *([], [0.1], [0.1, 0.2, 0.3], {}, {"a": 1}, [[]], [None], "http://[", "s3://x", "text", "x" * 300),
)
edges = st.sampled_from(EDGES)
arbitrary = st.recursive(
    edges | st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SOURCES = tuple(
    {"kind": kind, **keys}
    for kind, keys in (
        ("python-docs", {}),
        ("python-code", {"package": "json"}),
        ("text", {"paths": ["*.txt"], "document": "separator", "separator": "--"}),
        ("jsonl", {"paths": ["*.jsonl"], "text_key": "text", "weight": 0.5}),
        ("parquet", {"paths": ["s3://bucket/*.parquet"], "max_documents": 3}),
        ("url", {"url": "https://example.org/a", "sha256": "0" * 64, "format": "jsonl"}),
        ("huggingface", {"dataset": "a/b", "revision": "0" * 40, "name": None}),
    )
)
KEYS = sorted(
    {
        *SHIPPED,
        *FilterParams.model_fields,
        *(key for values in SHIPPED.values() if isinstance(values, dict) for key in values),
    }
)


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """The shipped parameters after a few changes at any depth."""
    tree = copy.deepcopy(SHIPPED)
    tree["collect"]["sources"] = draw(st.lists(st.sampled_from(SOURCES).map(dict), min_size=1, max_size=2))
    for _ in range(draw(st.integers(0, 4))):
        node: Any = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys)) if keys else None
            below = node[key] if keys else None
            if not isinstance(below, dict | list) or not below or draw(st.integers(0, 3)) == 0:
                break
            node = below
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "replace" and keys:
            node[key] = draw(arbitrary)
        elif change == "remove" and keys:
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.sampled_from(KEYS) | st.text(max_size=6))] = draw(arbitrary)
        else:
            node.append(draw(arbitrary))
    return tree


def check(content: bytes) -> None:
    """Load a file. If it is rejected, each line names the file and contains no control characters."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "params.yaml")
        path.write_bytes(content)
        try:
            assert isinstance(load_params(path), Params)
        except ConfigError as error:
            lines = str(error).split("\n")
            assert len(set(lines)) == len(lines)
            for line in lines:
                assert line.startswith((f"{path}: ", f"{path}, line ")), line
                assert line.partition(": ")[2].strip()
                assert not any(unicodedata.category(character) == "Cc" for character in line), line


@given(trees())
@settings(max_examples=60)
def test_changed_parameters_load_or_are_rejected(tree: Any) -> None:
    check(yaml.safe_dump(tree, allow_unicode=True).encode())


@given(arbitrary)
@settings(max_examples=40)
def test_any_other_yaml_loads_or_is_rejected(tree: Any) -> None:
    check(yaml.safe_dump(tree, allow_unicode=True).encode())


@given(
    st.text(st.sampled_from("-:[]{}&*!|>'\"%@`#?, \n\tabc01<~\u00e9\u2028\x85"), max_size=40)
    | st.binary(max_size=40).map(lambda b: b.decode("latin-1"))
)
def test_any_text_loads_or_is_rejected(text: str) -> None:
    check(text.encode())


@given(st.binary(max_size=60))
def test_any_bytes_load_or_are_rejected(content: bytes) -> None:
    check(content)

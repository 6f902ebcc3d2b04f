"""Reads params.yaml into frozen objects, and reports every invalid value at once.

Values live in params.yaml alone. A section is a subclass of `Section`, declared beside the code of its stage.
Cross-field checks are attached to the last field, so they run even if other fields are invalid.
"""

import difflib
import json
import warnings
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode

from gptpipe.shell.errors import ConfigError, first_line

PARAMS = Path("params.yaml")
_MOST_BYTES, _MOST_NODES = 1 << 18, 10_000  # of the file: its size, and its values with aliases expanded
_MOST_FAULTS, _LONGEST_SHOWN = 100, 100  # of a message: lines, and characters of a value or a key

Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Ratio = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of params.yaml: strict types, no unknown key, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Params = TypeVar("Params", bound=Section)


def read_params(path: Path, kind: type[Params]) -> Params:
    """Read a YAML file as an object of `kind`. Raises ConfigError that lists every fault, one per line."""
    values = _read_yaml(path)
    try:
        # Strict JSON mode takes a list where a tuple is wanted, and nothing else that is not of the right type.
        # The context is for checks that span two sections.
        return kind.model_validate_json(json.dumps(values), context=values)
    except ValidationError as error:
        faults = [
            fault
            for fault in error.errors()
            if fault["type"] != "too_short" or not fault["input"]  # else it is the items that are wrong, and reported
        ]
        lines = [f"{path}: {_in_words(fault, kind)}" for fault in faults[:_MOST_FAULTS]]
        if len(faults) > _MOST_FAULTS:
            lines.append(f"{path}: and {len(faults) - _MOST_FAULTS:,} more")
        raise ConfigError(*lines) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file that JSON can hold. Raises ConfigError for what is not plain YAML, or is too large."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; run from the project's root") from error
    try:
        if len(content) > _MOST_BYTES:
            raise _TooLarge(f"more than {_MOST_BYTES:,} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ruamel.yaml has some, of several lines, for doubtful YAML
            # YAML 1.2: `1e-05`, which `dvc exp run -S` writes, is a number, and `yes` is text.
            yaml = YAML(typ="safe", pure=True)
            yaml.Composer = _Composer
            raw = yaml.load(content)
        json.dumps(raw)
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {first_line(ValueError(error.problem or error.context))}") from error
    except _TooLarge as error:
        raise ConfigError(f"{path}: {error}; start from the params.yaml of the project") from error
    except Exception as error:  # ruamel.yaml raises KeyError, AttributeError and more for a value that its tag forbids
        raise ConfigError(f"{path}: not plain YAML: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds no sections; start from the params.yaml of the project")
    return raw


class _TooLarge(Exception):
    """params.yaml is above a limit."""


class _Composer(Composer):
    """Builds the graph of nodes, and counts them before aliases are expanded."""

    n_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.n_nodes += 1
        if self.n_nodes > _MOST_NODES:
            raise _TooLarge(f"more than {_MOST_NODES:,} values")
        return super().compose_node(parent, index)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MOST_NODES:
            raise _TooLarge(f"more than {_MOST_NODES:,} values, with each alias expanded")
        return node


def _expanded_size(node: Any, sizes: dict[int, int]) -> int:
    """The number of nodes with each alias counted in full. `sizes` holds what is counted, and 0 for what is being."""
    if sizes.get(id(node)) == 0:
        raise ValueError("a value that contains itself")
    if id(node) not in sizes:
        sizes[id(node)] = 0
        children = node.value if isinstance(node, CollectionNode) else ()
        nodes = chain.from_iterable(children) if isinstance(node, MappingNode) else children
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in nodes)
    return sizes[id(node)]


def _in_words(fault: ErrorDetails, root: type[BaseModel]) -> str:
    """One fault as `key: what is wrong`, an unknown key with its nearest neighbour."""
    location, value = fault["loc"], fault["input"]
    name = ".".join(_shortened(str(part)) for part in location)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys_beside(location, root), n=1, cutoff=0.5)
        return f"{name}: unknown key" + (f"; did you mean `{near[0]}`?" if near else "")
    if not name:
        return message
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return f"{name}: {message}" + (f", got {_shortened(repr(value))}" if is_plain else "")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _keys_beside(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The keys that are known where `location` points, for an error in an object of `root`."""
    kinds = [root]
    for part in location[:-1]:
        if any(part in kind.model_fields for kind in kinds):
            kinds = [
                model
                for kind in kinds
                if isinstance(part, str) and part in kind.model_fields
                for model in _models_in(kind.model_fields[part].annotation)
            ]
        elif isinstance(part, str):  # the tag of one kind among several
            kinds = [kind for kind in kinds if part in get_args(kind.model_fields["kind"].annotation)]
    return [key for kind in kinds for key in kind.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type annotation names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]

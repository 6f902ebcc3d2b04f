"""Read params.yaml into frozen objects, and report all invalid values at once.

The code has no default values. A section is a subclass of `Section`, declared next to the code of its stage.
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
_MAX_BYTES = 1 << 18  # of the file
_MAX_NODES = 10_000  # values in the file, with aliases expanded
_MAX_FAULTS = 100  # lines of a message
_MAX_SHOWN = 100  # characters of a value or a key in a message

Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Ratio = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of params.yaml: strict types, no unknown keys, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Params = TypeVar("Params", bound=Section)


def read_params(path: Path, kind: type[Params]) -> Params:
    """Read a YAML file as an object of `kind`. Raises ConfigError that lists all errors, one per line."""
    values = _read_yaml(path)
    try:
        # In strict JSON mode, a list is accepted for a tuple, and all other types must be exact.
        # The context is for checks across two sections.
        return kind.model_validate_json(json.dumps(values), context=values)
    except ValidationError as error:
        # Pydantic drops invalid items from a list and then reports that the list is too short.
        faults = [fault for fault in error.errors() if fault["type"] != "too_short" or not fault["input"]]
        lines = [f"{path}: {_message(fault, kind)}" for fault in faults[:_MAX_FAULTS]]
        if len(faults) > _MAX_FAULTS:
            lines.append(f"{path}: and {len(faults) - _MAX_FAULTS:,} more")
        raise ConfigError(*lines) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file.

    Raises ConfigError if it is too large, or contains values that JSON does not have.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; run from the project's root") from error
    try:
        if len(content) > _MAX_BYTES:
            raise _TooLargeError(f"more than {_MAX_BYTES:,} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ruamel.yaml prints long warnings for unusual YAML
            # In YAML 1.2, `1e-05`, which `dvc exp run -S` writes, is a number, and `yes` is a string.
            yaml = YAML(typ="safe", pure=True)
            yaml.Composer = _Composer
            raw = yaml.load(content)
        json.dumps(raw)
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {first_line(ValueError(error.problem or error.context))}") from error
    except _TooLargeError as error:
        raise ConfigError(f"{path}: {error}; start from the params.yaml of the project") from error
    except Exception as error:  # ruamel.yaml raises KeyError and others for a value with a wrong tag
        raise ConfigError(f"{path}: not plain YAML: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: contains no sections; start from the params.yaml of the project")
    return raw


class _TooLargeError(Exception):
    """params.yaml exceeds a limit."""


class _Composer(Composer):
    """Limits the number of nodes, without and with aliases expanded, before values are built from them."""

    n_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.n_nodes += 1
        if self.n_nodes > _MAX_NODES:
            raise _TooLargeError(f"more than {_MAX_NODES:,} values")
        return super().compose_node(parent, index)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MAX_NODES:
            raise _TooLargeError(f"more than {_MAX_NODES:,} values, with each alias expanded")
        return node


def _expanded_size(node: Any, sizes: dict[int, int]) -> int:
    """The number of nodes below and including `node`, where each alias counts as a copy.

    `sizes` maps the id of a node to its size, or to 0 while its size is being computed.
    """
    key = id(node)
    if sizes.get(key) == 0:
        raise ValueError("a value that contains itself")
    if key not in sizes:
        sizes[key] = 0
        children = node.value if isinstance(node, CollectionNode) else ()
        if isinstance(node, MappingNode):
            children = chain.from_iterable(children)  # pairs of key and value
        sizes[key] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[key]


def _message(fault: ErrorDetails, root: type[BaseModel]) -> str:
    """One error as `key: what is wrong`. For an unknown key, it suggests the most similar known one."""
    location = fault["loc"]
    value = fault["input"]
    name = ".".join(_shortened(str(part)) for part in location)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "extra_forbidden":
        matches = difflib.get_close_matches(str(location[-1]), _known_keys(location, root), n=1, cutoff=0.5)
        return f"{name}: unknown key" + (f"; did you mean `{matches[0]}`?" if matches else "")
    if not name:
        return message
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return f"{name}: {message}" + (f", got {_shortened(repr(value))}" if is_plain else "")


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The keys that are allowed instead of the last part of `location`, a path that starts at `root`."""
    models = [root]
    for part in location[:-1]:
        fields = [
            model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields
        ]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        elif isinstance(part, str):  # the `kind` that selects one of several models
            models = [model for model in models if part in get_args(model.model_fields["kind"].annotation)]
    return [key for model in models for key in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """All models in a type annotation, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]

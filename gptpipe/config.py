"""params.yaml as frozen objects: the one place that knows which values make sense.

Values live in params.yaml alone; nothing here has a default, apart from the optional keys of a source.
"""

import difflib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from gptpipe.errors import ConfigError

PARAMS = Path("params.yaml")

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A section of params.yaml: strict types, no unknown key, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PythonDocs(Section):
    """Help topics and docstrings of the standard library of the running Python."""

    kind: Literal["python-docs"]


class Text(Section):
    """Plain text files."""

    kind: Literal["text"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]  # globs
    document: Literal["file", "line", "separator"] = "file"
    separator: Annotated[str, Field(min_length=1)] | None = None  # only with document: separator

    @model_validator(mode="after")
    def _has_its_separator(self) -> Self:
        if (self.document == "separator") != (self.separator is not None):
            raise ValueError("`separator` goes with `document: separator`, and only with it")
        return self


class Jsonl(Section):
    """One JSON object per line."""

    kind: Literal["jsonl"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    text_key: str = "text"


class Parquet(Section):
    """A column of Parquet files."""

    kind: Literal["parquet"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    text_column: str = "text"


Source = Annotated[PythonDocs | Text | Jsonl | Parquet, Field(discriminator="kind")]


class CollectParams(Section):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    encoding_errors: Literal["strict", "replace"]
    min_document_bytes: Positive
    max_document_bytes: Annotated[int, Field(ge=64)]
    dedup: Literal["none", "exact"]


class TokenizeParams(Section):
    encoding: Annotated[str, Field(min_length=1)]
    vocab_size: Annotated[int, Field(ge=257)]  # 256 bytes and the end-of-text token

    @property
    def is_trained(self) -> bool:
        return self.encoding == "trained"


class SplitParams(Section):
    val_fraction: Share
    test_fraction: Share

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must be below 1")
        return self


class ModelParams(Section):
    """The network, but for its vocabulary, which the tokenizer decides."""

    architecture: Literal["gpt2", "llama", "qwen3"]
    context_length: Annotated[int, Field(ge=2)]
    n_layer: Positive
    n_head: Positive
    n_kv_head: Positive
    n_embd: Positive
    head_dim: Positive | None
    n_inner: Positive
    dropout: Share
    rope_theta: PositiveFloat
    norm_eps: PositiveFloat
    tie_embeddings: bool

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} must divide n_embd {self.n_embd}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} must divide n_head {self.n_head}")
        if self.architecture == "gpt2" and self.n_kv_head != self.n_head:
            raise ValueError(f"gpt2 has one key and value head per query head: set n_kv_head to {self.n_head}")
        if self.architecture == "gpt2" and self.head_dim not in (None, self.n_embd // self.n_head):
            raise ValueError("gpt2 has heads of n_embd / n_head numbers: set head_dim to null")
        if self.architecture == "gpt2" and not self.tie_embeddings:
            raise ValueError("gpt2 has one matrix for input and output: set tie_embeddings to true")
        if self.architecture != "gpt2" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, it is {self.head_width}")
        return self


class TrainParams(Section):
    init_from: str | None
    launcher: str
    optimizer: Literal["adamw", "muon"]
    lr: PositiveFloat
    betas: tuple[Share, Share]
    weight_decay: Annotated[FiniteFloat, Field(ge=0)]
    grad_clip: PositiveFloat | None
    schedule: Literal["cosine", "wsd", "linear", "constant"]
    warmup_steps: Count
    decay_fraction: Annotated[FiniteFloat, Field(gt=0, le=1)]
    final_lr_fraction: Annotated[FiniteFloat, Field(ge=0, le=1)]
    batch_size: Positive
    micro_batch_size: Positive | None
    stride: Positive
    epochs: PositiveFloat | None
    max_steps: Positive | None
    eval_every: Positive
    save_every: Positive
    patience: Positive | None
    activation_checkpointing: bool
    sample_prompts: tuple[str, ...]
    sample_tokens: Positive
    device: str
    precision: Literal["auto", "float32", "bfloat16"]
    compile: Literal["auto"] | bool

    @model_validator(mode="after")
    def _ends_after_warmup(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("one of epochs and max_steps must be set")
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below max_steps {self.max_steps}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        return self

    def n_steps(self, n_windows: int) -> int:
        """Optimizer steps of the whole training: the smaller of `max_steps` and `epochs` over `n_windows` windows."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None:
            limits.append(max(1, math.ceil(self.epochs * n_windows / self.batch_size)))
        return min(limits)


class EvaluateParams(Section):
    prompts: tuple[str, ...]
    max_new_tokens: Positive
    temperature: Annotated[FiniteFloat, Field(ge=0)]
    top_k: Positive | None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)]
    continuation_documents: Count
    continuation_tokens: Positive


class Params(Section):
    """All of params.yaml."""

    seed: Seed
    collect: CollectParams
    tokenize: TokenizeParams
    split: SplitParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams

    @model_validator(mode="after")
    def _windows_leave_no_gap(self) -> Self:
        if self.train.stride > self.model.context_length:
            raise ValueError(
                f"train.stride {self.train.stride} is above model.context_length {self.model.context_length}: "
                "the tokens between two windows would never be trained on"
            )
        return self


def load_params(path: Path = PARAMS) -> Params:
    """Read and check params.yaml. Raises ConfigError that lists every fault, one per line."""
    try:
        # YAML 1.2: `1e-05`, which `dvc exp run -S` writes, is a number, and `yes` is text.
        raw = YAML(typ="safe", pure=True).load(path.read_bytes())
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: holds no sections; start from the params.yaml of the project")
        # Strict JSON mode takes a list where a tuple is wanted, and nothing else that is not of the right type.
        return Params.model_validate_json(json.dumps(raw))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; run from the project's root") from error
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {str(error.problem).splitlines()[0]}") from error
    except (UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: not plain YAML: {error}") from error
    except ValidationError as error:
        faults = [_in_words(fault["loc"], fault["type"], fault["msg"], fault.get("input")) for fault in error.errors()]
        raise ConfigError(f"{path}: " + f"\n{path}: ".join(faults)) from error


def _in_words(location: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    """One fault as `key: what is wrong`, an unknown key with its nearest neighbour."""
    name = ".".join(str(part) for part in location)
    message = message.removeprefix("Value error, ")
    if kind == "missing":
        return f"{name}: missing"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys_beside(location), n=1, cutoff=0.5)
        return f"{name}: unknown key" + (f"; did you mean `{near[0]}`?" if near else "")
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"{name}: {message}, got {value!r}"
    return f"{name}: {message}" if name else message


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are known where `location` points."""
    if len(location) == 1:
        return list(Params.model_fields)
    if location[:2] == ("collect", "sources"):
        kinds: dict[str, type[Section]] = {"python-docs": PythonDocs, "text": Text, "jsonl": Jsonl, "parquet": Parquet}
        return list(kinds[str(location[3])].model_fields) if len(location) > 4 else []
    section = Params.model_fields[str(location[0])].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []

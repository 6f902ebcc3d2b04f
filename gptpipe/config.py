"""params.yaml as frozen objects: the one place that knows which values make sense.

Values live in params.yaml alone; nothing here has a default, apart from the optional keys of sources.
Cross-field checks are attached to the last field, so they run even if other fields are invalid.
"""

import difflib
import json
import math
import re
import warnings
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode

from gptpipe.errors import ConfigError, first_line

PARAMS = Path("params.yaml")
_MOST_BYTES, _MOST_NODES = 1 << 18, 10_000  # of the file: its size, and its values with aliases expanded
_MOST_FAULTS, _LONGEST_SHOWN = 100, 100  # of a message: lines, and characters of a value or a key

Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Ratio = Annotated[FiniteFloat, Field(ge=0, le=1)]
Phrase = Annotated[str, Field(min_length=1)]
# A local path has no scheme: what has one is a remote address.
Glob = Annotated[str, AfterValidator(lambda path: re.sub("^(file|local)://", "", path))]
Paths = Annotated[tuple[Glob, ...], Field(min_length=1)]


class Section(BaseModel):
    """A section of params.yaml: strict types, no unknown key, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AnySource(Section):
    """What every source may have."""

    max_documents: Positive | None = None  # kept ones, then the source ends
    max_bytes: Positive | None = None  # the same, in bytes of text
    weight: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0  # share of its documents to keep, drawn by id


class Python(AnySource):
    """Docstrings or code of an installed package; of none named, of the standard library, with its help topics."""

    kind: Literal["python-docs", "python-code"]
    package: Annotated[str, Field(pattern=r"^\w+$")] | None = None  # as in `import`


class Text(AnySource):
    """Plain text files."""

    kind: Literal["text"]
    paths: Paths  # globs, or addresses
    document: Literal["file", "line", "separator"] = "file"
    separator: Annotated[str | None, Field(min_length=1, validate_default=True)] = None  # for document: separator

    @field_validator("separator")
    @classmethod
    def _goes_with_document(cls, separator: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("document") == "separator") != (separator is not None):
            raise ValueError("goes with `document: separator`, and only with it")
        return separator


class Jsonl(AnySource):
    """One JSON object per line."""

    kind: Literal["jsonl"]
    paths: Paths
    text_key: str = "text"


class Parquet(AnySource):
    """A column of Parquet files."""

    kind: Literal["parquet"]
    paths: Paths
    text_column: str = "text"


class Url(AnySource):
    """One file to download."""

    kind: Literal["url"]
    url: Annotated[str, Field(pattern="^https?://")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    format: Literal["text", "jsonl", "parquet"] = "text"
    text_key: str = "text"  # or column
    document: Literal["file", "line"] = "file"


class HuggingFace(AnySource):
    """One split of a dataset of the Hugging Face hub, or of a dataset folder."""

    kind: Literal["huggingface"]
    dataset: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]  # a commit: branches and tags move
    name: str | None = None  # of the dataset's configuration
    split: str = "train"
    text_column: str = "text"


Source = Annotated[Python | Text | Jsonl | Parquet | Url | HuggingFace, Field(discriminator="kind")]


class FilterParams(Section):
    """Which lines and documents stay in the corpus; null, false or no phrase: that filter is off."""

    drop_lines_with: tuple[Phrase, ...]
    drop_lines_below: Positive | None  # words
    drop_lines_unfinished: bool
    phrases: tuple[Phrase, ...]
    sentences: Positive | None
    words: tuple[Count, Positive] | None
    mean_word_length: tuple[PositiveFloat, PositiveFloat] | None  # characters
    symbols_per_word: Annotated[FiniteFloat, Field(ge=0)] | None
    ellipsis_lines: Ratio | None
    bullet_lines: Ratio | None
    alphabetic_words: Ratio | None
    stop_words: Annotated[int, Field(ge=1, le=8)] | None
    duplicate_lines: tuple[Ratio, Ratio] | None  # of lines, of their characters
    duplicate_paragraphs: tuple[Ratio, Ratio] | None
    top_ngrams: tuple[Ratio, Ratio, Ratio] | None  # of 2 to 4 words
    duplicate_ngrams: tuple[Ratio, Ratio, Ratio, Ratio, Ratio, Ratio] | None  # of 5 to 10 words


class CollectParams(Section):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    encoding_errors: Literal["strict", "replace"]
    min_document_bytes: Positive
    max_document_bytes: Annotated[int, Field(ge=64, lt=2**31)]
    max_expansion: Positive
    filters: FilterParams
    dedup: Literal["none", "exact", "near"]
    near_similarity: Annotated[FiniteFloat, Field(ge=0.5, le=1)]


class TokenizeParams(Section):
    encoding: Annotated[str, Field(min_length=1)]
    vocab_size: Annotated[int, Field(ge=257, lt=2**31)]  # 256 bytes and the end-of-text token
    training_bytes: Positive  # about so much text, of documents drawn by id

    @property
    def is_trained(self) -> bool:
        return self.encoding == "trained"


class SplitParams(Section):
    val_fraction: Share
    test_fraction: Share
    ngram: Annotated[int, Field(ge=2)]  # words
    benchmarks: tuple[Source, ...]
    max_contamination: Ratio | None

    @field_validator("test_fraction")
    @classmethod
    def _leaves_something_to_train_on(cls, test_fraction: float, info: ValidationInfo) -> float:
        if info.data.get("val_fraction", 0) + test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must be below 1")
        return test_fraction


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

    @field_validator("n_kv_head")
    @classmethod
    def _divides_query_heads(cls, n_kv_head: int, info: ValidationInfo) -> int:
        n_head = info.data.get("n_head", n_kv_head)
        if n_head % n_kv_head:
            raise ValueError(f"must divide n_head {n_head}")
        if info.data.get("architecture") == "gpt2" and n_kv_head != n_head:
            raise ValueError(f"gpt2 has one key and value head per query head: set it to {n_head}")
        return n_kv_head

    @field_validator("head_dim")
    @classmethod
    def _fits_the_width(cls, head_dim: int | None, info: ValidationInfo) -> int | None:
        n_head, n_embd = info.data.get("n_head"), info.data.get("n_embd")
        if n_head is None or n_embd is None:
            return head_dim
        if head_dim is None and n_embd % n_head:
            raise ValueError(f"n_head {n_head} must divide n_embd {n_embd} where head_dim is null")
        if info.data.get("architecture") == "gpt2":
            if head_dim not in (None, n_embd / n_head):
                raise ValueError("gpt2 has heads of n_embd / n_head numbers: set it to null")
        elif (head_dim or n_embd // n_head) % 2:
            raise ValueError(f"rotary positions need an even head width, it is {head_dim or n_embd // n_head}")
        return head_dim

    @field_validator("tie_embeddings")
    @classmethod
    def _is_tied_in_gpt2(cls, tie_embeddings: bool, info: ValidationInfo) -> bool:
        if info.data.get("architecture") == "gpt2" and not tie_embeddings:
            raise ValueError("gpt2 has one matrix for input and output: set it to true")
        return tie_embeddings


class TrainParams(Section):
    init_from: str | None
    launcher: str
    parallel: Literal["ddp", "fsdp"]
    optimizer: Literal["adamw", "muon"]
    lr: PositiveFloat
    betas: tuple[Share, Share]
    weight_decay: Annotated[FiniteFloat, Field(ge=0)]
    grad_clip: PositiveFloat | None
    z_loss: Annotated[FiniteFloat, Field(ge=0)]
    on_spike: Literal["stop", "rollback"]
    spike_sigmas: PositiveFloat | None
    schedule: Literal["cosine", "wsd", "linear", "constant"]
    warmup_steps: Count
    decay_fraction: Annotated[FiniteFloat, Field(gt=0, le=1)]
    final_lr_fraction: Ratio
    batch_size: Positive
    micro_batch_size: Positive | None
    stride: Positive
    document_masking: bool
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
    compile: Literal["auto", True, False]

    @field_validator("micro_batch_size")
    @classmethod
    def _divides_the_batch(cls, micro_batch_size: int | None, info: ValidationInfo) -> int | None:
        batch_size = info.data.get("batch_size")
        if batch_size and micro_batch_size and batch_size % micro_batch_size:
            raise ValueError(f"must divide batch_size {batch_size}")
        return micro_batch_size

    @field_validator("stride")
    @classmethod
    def _leaves_no_gap(cls, stride: int, info: ValidationInfo) -> int:
        context_length = (info.context or {}).get("context_length")
        if isinstance(context_length, int) and stride > context_length:
            raise ValueError(
                f"above model.context_length {context_length}: tokens between two windows would never be trained on"
            )
        return stride

    @field_validator("max_steps")
    @classmethod
    def _ends_after_warmup(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if max_steps is None and info.data.get("epochs", 0) is None:
            raise ValueError("one of epochs and max_steps must be set")
        if max_steps is not None and info.data.get("warmup_steps", 0) >= max_steps:
            raise ValueError(f"must be above warmup_steps {info.data['warmup_steps']}")
        return max_steps

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

    seed: Count
    collect: CollectParams
    tokenize: TokenizeParams
    split: SplitParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams


def load_params(path: Path = PARAMS) -> Params:
    """Read and check params.yaml. Raises ConfigError that lists every fault, one per line."""
    text, model = _as_json(path)
    try:
        # Strict JSON mode takes a list where a tuple is wanted, and nothing else that is not of the right type.
        # The context is for the one check that spans two sections.
        return Params.model_validate_json(text, context=model)
    except ValidationError as error:
        faults = [
            fault
            for fault in error.errors()
            if fault["type"] != "too_short" or not fault["input"]  # else it is the items that are wrong, and reported
        ]
        lines = [
            f"{path}: {_in_words(fault['loc'], fault['type'], fault['msg'], fault.get('input'))}"
            for fault in faults[:_MOST_FAULTS]
        ]
        if len(faults) > _MOST_FAULTS:
            lines.append(f"{path}: and {len(faults) - _MOST_FAULTS:,} more")
        raise ConfigError(*lines) from error


def _as_json(path: Path) -> tuple[str, dict[str, Any]]:
    """All values as JSON, and section `model`. Raises ConfigError for what is not plain YAML, or is too large."""
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
        text = json.dumps(raw)
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {first_line(ValueError(error.problem or error.context))}") from error
    except _TooLarge as error:
        raise ConfigError(f"{path}: {error}; start from the params.yaml of the project") from error
    except Exception as error:  # ruamel.yaml raises KeyError, AttributeError and more for a value that its tag forbids
        raise ConfigError(f"{path}: not plain YAML: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds no sections; start from the params.yaml of the project")
    model = raw.get("model")
    return text, model if isinstance(model, dict) else {}


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


def _in_words(location: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    """One fault as `key: what is wrong`, an unknown key with its nearest neighbour."""
    name = ".".join(_shortened(str(part)) for part in location)
    message = message.removeprefix("Value error, ")
    if kind == "missing":
        return f"{name}: missing"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys_beside(location), n=1, cutoff=0.5)
        return f"{name}: unknown key" + (f"; did you mean `{near[0]}`?" if near else "")
    if not name:
        return message
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return f"{name}: {message}" + (f", got {_shortened(repr(value))}" if is_plain else "")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are known where `location` points."""
    if len(location) == 1:
        return list(Params.model_fields)
    sections: dict[Any, Any] = {name: field.annotation for name, field in Params.model_fields.items()}
    for kind in AnySource.__subclasses__():
        sections |= dict.fromkeys(get_args(kind.model_fields["kind"].annotation), kind)
    section = FilterParams if location[-2] == "filters" else sections.get(location[-2])
    return list(getattr(section, "model_fields", ()))

"""Section `collect` of params.yaml. Only the optional keys of sources have a default here."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat, ValidationInfo, field_validator

from gptpipe.base.params import Count, Positive, PositiveFloat, Ratio, Section

Phrase = Annotated[str, Field(min_length=1)]
# A local path has no scheme: what has one is a remote address.
Glob = Annotated[str, AfterValidator(lambda path: re.sub("^(file|local)://", "", path))]
Paths = Annotated[tuple[Glob, ...], Field(min_length=1)]


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
    """Section `collect` of params.yaml."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    encoding_errors: Literal["strict", "replace"]
    min_document_bytes: Positive
    max_document_bytes: Annotated[int, Field(ge=64, lt=2**31)]
    max_expansion: Positive
    filters: FilterParams
    dedup: Literal["none", "exact", "near"]
    near_similarity: Annotated[FiniteFloat, Field(ge=0.5, le=1)]

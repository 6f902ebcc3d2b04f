"""Section `collect` of params.yaml. Only optional keys of sources have a default here."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat, ValidationInfo, field_validator

from gptpipe.base.params import Count, Positive, PositiveFloat, Ratio, Section

Phrase = Annotated[str, Field(min_length=1)]
# An address with a scheme is remote, so a local one loses its scheme.
Glob = Annotated[str, AfterValidator(lambda path: re.sub("^(file|local)://", "", path))]
Paths = Annotated[tuple[Glob, ...], Field(min_length=1)]


class AnySource(Section):
    """Keys of every kind of source."""

    max_documents: Positive | None = None  # kept; the source ends after the last of them
    max_bytes: Positive | None = None  # kept, of text; the source ends with the document that reaches it
    weight: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0  # fraction of its documents to keep, chosen by id


class Python(AnySource):
    """Docstrings or code of an installed package, or of the standard library and its help topics."""

    kind: Literal["python-docs", "python-code"]
    package: Annotated[str, Field(pattern=r"^\w+$")] | None = None  # as in `import`


class Text(AnySource):
    """Plain text files."""

    kind: Literal["text"]
    paths: Paths  # globs, local or remote
    document: Literal["file", "line", "separator"] = "file"
    separator: Annotated[str | None, Field(min_length=1, validate_default=True)] = None  # for document: separator

    @field_validator("separator")
    @classmethod
    def _goes_with_document(cls, separator: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("document") == "separator") != (separator is not None):
            raise ValueError("is required with `document: separator`, and not allowed without it")
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
    text_key: str = "text"  # for format parquet: the column
    document: Literal["file", "line"] = "file"


class HuggingFace(AnySource):
    """One split of a dataset on the Hugging Face hub, or of a local dataset folder."""

    kind: Literal["huggingface"]
    dataset: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]  # a commit, because branches and tags move
    name: str | None = None  # of the configuration of the dataset
    split: str = "train"
    text_column: str = "text"


Source = Annotated[Python | Text | Jsonl | Parquet | Url | HuggingFace, Field(discriminator="kind")]


class FilterParams(Section):
    """Which lines and documents stay in the corpus. A filter is off if it is null, false or an empty list."""

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
    duplicate_lines: tuple[Ratio, Ratio] | None  # fraction of lines, of characters
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

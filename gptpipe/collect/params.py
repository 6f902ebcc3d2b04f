"""Section `collect` of params.yaml. Only optional keys of sources have a default here."""

import codecs
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, FiniteFloat, ValidationInfo, field_validator

from gptpipe.base.params import Count, Positive, PositiveFloat, Ratio, Section

Phrase = Annotated[str, Field(min_length=1)]
# An address with a scheme is remote, so a local one loses its scheme.
Glob = Annotated[str, AfterValidator(lambda path: re.sub("^(file|local)://", "", path))]
Paths = Annotated[tuple[Glob, ...], Field(min_length=1)]


class AnySource(Section):
    """Keys of every kind of source."""

    # At a damaged record: name all such files and stop, or skip and count it.
    on_bad: Literal["stop", "skip"] = "stop"
    max_bad: Ratio = 0.05  # for on_bad: skip; a larger share of bad records stops the stage
    keep_trailing_spaces: bool = False  # at the ends of lines; two of them are a line break in Markdown
    max_documents: Positive | None = None  # kept; the source ends after the last of them
    max_bytes: Positive | None = None  # kept, of text; the source ends with the document that reaches it
    weight: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0  # fraction of its documents to keep, chosen by id
    license: Phrase | None = None  # of the texts, as the model card states it

    @property
    def description(self) -> str:
        """Kind and place, for reports."""
        keys = ("paths", "url", "dataset", "name", "split", "package")
        values = [getattr(self, key, None) for key in keys]
        places = [", ".join(value) if isinstance(value, tuple) else value for value in values if value]
        return " ".join([getattr(self, "kind", ""), *places])

    @property
    def stated_license(self) -> str | None:
        """The licence of the texts, if it is known."""
        return self.license

    @property
    def hub_dataset(self) -> str | None:
        """The name of a data set on the Hugging Face hub."""
        return None


class Python(AnySource):
    """Docstrings or code of an installed package, or of the standard library and its help topics."""

    kind: Literal["python-docs", "python-code"]
    package: Annotated[str, Field(pattern=r"^\w+$")] | None = None  # as in `import`

    @property
    def stated_license(self) -> str | None:
        """By default that of Python, for its standard library and help topics."""
        return self.license or ("PSF-2.0" if self.package is None else None)


def _check_encoding(name: str) -> str:
    """The usual name of an encoding. Raises ValueError unless Python knows it, and it is one of text."""
    try:
        "".encode(name)
    except LookupError as error:
        raise ValueError(
            "is not an encoding that Python knows, such as utf-8, utf-16, cp1252 or shift_jis"
        ) from error
    return codecs.lookup(name).name


class Files(AnySource):
    """Keys of sources that are files."""

    paths: Paths  # globs, local or remote
    members: Phrase | None = None  # glob of the names in an archive
    # Of the text; a file that starts with the byte order mark of UTF-16 or UTF-32 is read as that.
    encoding: Annotated[str, AfterValidator(_check_encoding)] = "utf-8"


class Text(Files):
    """Plain text files."""

    kind: Literal["text"]
    format: ClassVar[Literal["text"]] = "text"
    document: Literal["file", "line", "separator"] = "file"
    # For document: separator.
    separator: Annotated[str | None, Field(min_length=1, validate_default=True)] = None

    @field_validator("separator")
    @classmethod
    def _goes_with_document(cls, separator: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("document") == "separator") != (separator is not None):
            raise ValueError("is required with `document: separator`, and not allowed without it")
        return separator


class Jsonl(Files):
    """One JSON object per line."""

    kind: Literal["jsonl"]
    format: ClassVar[Literal["jsonl"]] = "jsonl"
    text_key: str = "text"  # `a.b` is the key `b` of the object at key `a`


class Parquet(AnySource):
    """A column of Parquet files."""

    kind: Literal["parquet"]
    format: ClassVar[Literal["parquet"]] = "parquet"
    paths: Paths  # globs, local or remote
    members: Phrase | None = None  # glob of the names in an archive
    text_column: str = "text"  # `a.b` is the field `b` of the column `a`


class Url(AnySource):
    """One file to download."""

    kind: Literal["url"]
    url: Annotated[str, Field(pattern="^https?://")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    format: Literal["text", "jsonl", "parquet"] = "text"
    text_key: str = "text"  # for format parquet: the column
    document: Literal["file", "line"] = "file"
    members: Phrase | None = None  # glob of the names in an archive
    encoding: Annotated[str, AfterValidator(_check_encoding)] = "utf-8"


class HuggingFace(AnySource):
    """One split of a dataset on the Hugging Face hub, or of a local dataset folder."""

    kind: Literal["huggingface"]
    dataset: Annotated[str, Field(min_length=1)]  # a name on the hub, or a local folder
    # A commit, because branches and tags move. A local folder has none.
    revision: Annotated[str | None, Field(pattern="^[0-9a-f]{40}$", validate_default=True)] = None
    name: str | None = None  # of the configuration of the dataset
    split: str = "train"
    text_column: str = "text"

    @field_validator("revision")
    @classmethod
    def _pins_a_dataset_of_the_hub(cls, revision: str | None, info: ValidationInfo) -> str | None:
        dataset = info.data.get("dataset")
        if revision is None and dataset and not Path(dataset).is_dir():
            raise ValueError(
                "is required for a dataset of the hub: the 40 hex digits of a commit; "
                f"{dataset} is not a local folder"
            )
        return revision

    @property
    def is_local(self) -> bool:
        """Whether it is a folder. `datasets` prefers a folder to a dataset of the hub with the same name."""
        return Path(self.dataset).is_dir()

    @property
    def hub_dataset(self) -> str | None:
        return None if self.is_local else self.dataset

    @property
    def address(self) -> str:
        """Its name in messages and in the manifest."""
        return f"huggingface://{self.dataset}/{self.name or 'default'}/{self.split}"


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

"""Nats and bytes of each held-out document: kept with a registered version, compared between two models.

Two models that were scored on the same documents are compared document by document. Most of the variation of
bits per byte is between documents, and cancels in the difference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa

from gptpipe.base.manifest import new_folder, verify
from gptpipe.base.parquet import new_parquet, read_parquet
from gptpipe.formats.sides import Side
from gptpipe.formats.streams import Stream
from gptpipe.score.metrics import ratio
from gptpipe.score.scoring import Scores

FOLDER = "documents"  # its name among the artifacts of a logged model
_FILE = "scores.parquet"
_SCHEMA = pa.schema(
    [
        ("split", pa.string()),  # val or test
        ("id", pa.string()),
        ("source", pa.string()),
        ("n_bytes", pa.int64()),  # of the text in UTF-8
        ("nats", pa.float64()),  # negative log-likelihood of the document's tokens
    ]
)


def score_table(scores: Mapping[Side, Scores], held_out: Mapping[Side, Stream]) -> pd.DataFrame:
    """A row for each held-out document, with the columns of the Parquet file."""
    tables = [
        stream.documents[["id", "source", "n_bytes"]].assign(split=side, nats=scores[side].by_document[0])
        for side, stream in held_out.items()
    ]
    return (
        pd.concat(tables, ignore_index=True)[_SCHEMA.names] if tables else pd.DataFrame(columns=_SCHEMA.names)
    )


def write_scores(folder: Path, table: pd.DataFrame, model_digest: str) -> None:
    """Write the table as a Parquet file with a manifest. Raises ResourceError."""
    with new_folder(folder, {"gpt": model_digest}) as new, new_parquet(new.path / _FILE, _SCHEMA) as rows:
        for batch in pa.Table.from_pandas(table, _SCHEMA, preserve_index=False).to_batches():
            rows.extend(batch)


def read_scores(folder: Path) -> pd.DataFrame:
    """The table of `write_scores`. Raises IntegrityError if it is damaged or missing."""
    verify(folder)
    batches = list(read_parquet(folder / _FILE, _SCHEMA.names))
    table: pd.DataFrame = pa.Table.from_batches(batches, _SCHEMA).to_pandas()
    return table


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one model less those of another, on the same documents."""

    bits_per_byte: float
    standard_error: float  # over documents
    n_documents: int

    @property
    def is_lower(self) -> bool:
        """Whether the first model is better by over two standard errors. One document has no known error."""
        return self.n_documents > 1 and self.bits_per_byte < -2 * self.standard_error

    def __str__(self) -> str:
        value = f"{self.bits_per_byte:+.4f} ± {self.standard_error:.4f} bits per byte"
        return f"{value} on the same {self.n_documents:,} documents"


def paired_difference(first: pd.DataFrame, second: pd.DataFrame, side: str) -> Difference | None:
    """The difference on one side of the split; None if the documents are not the same.

    The error is that of a ratio of sums over documents, as for the metrics themselves
    (`gptpipe.score.metrics.ratio`).
    """
    one, other = (
        table[table["split"] == side].sort_values("id", kind="stable", ignore_index=True)
        for table in (first, second)
    )
    if one.empty or not one[["id", "n_bytes"]].equals(other[["id", "n_bytes"]]):
        return None
    bits = ((one["nats"] - other["nats"]) / math.log(2)).to_numpy()
    return Difference(*ratio(bits, one["n_bytes"].to_numpy(dtype="float64")), n_documents=len(one))

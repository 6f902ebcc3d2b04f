"""Tokens on disk, data/tokens: one Parquet file `tokens-00000.parquet`, ... for each file of the corpus.

A row is a document: `id`, `source` and `n_bytes` as in the corpus, `n_tokens`, and `tokens`, a list of uint16
(uint32 from 65,536 vocabulary entries up) that ends with the end-of-text token. `n_tokens` is the length of the
list, which can be read without the list. The folder `tokenizer/` beside them made the tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gptpipe.base.manifest import Manifest
from gptpipe.base.parquet import verify_rows


def token_schema(dtype: np.dtype[Any]) -> pa.Schema:
    tokens = pa.list_(pa.from_numpy_dtype(dtype))
    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("n_bytes", pa.int64()),
            ("n_tokens", pa.int64()),
            ("tokens", tokens),
        ]
    )


def token_shard_path(folder: Path, corpus_shard: Path) -> Path:
    """Where the tokens of a file of the corpus are."""
    return folder / corpus_shard.name.replace("docs", "tokens")


def token_shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("tokens-*.parquet"))


def verify_tokens(folder: Path) -> Manifest:
    """The manifest of the token shards, after checking them and their rows. Raises IntegrityError."""
    return verify_rows(folder, {"tokens-*.parquet": "documents"})

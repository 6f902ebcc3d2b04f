"""Benchmarks: texts that train must not contain. They are read and cleaned like training text.

That is NFC, plain line ends, no control characters. No filter applies, no duplicate is removed. In particular,
lines that a filter drops from train are kept: train may contain their words in another line.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams, FilterParams, Source
from gptpipe.formats.corpus import shard_paths
from gptpipe.shell.errors import InputError

_NO_FILTERS = FilterParams.model_validate(
    {
        **dict.fromkeys(FilterParams.model_fields),
        "drop_lines_with": (),
        "drop_lines_unfinished": False,
        "phrases": (),
    }
)


class Benchmark(NamedTuple):
    """One benchmark on disk."""

    description: str
    shards: list[Path]  # as of a corpus
    numbers: npt.NDArray[np.int64]  # of the item of each document in the shards, in the source and from 1
    n_rejected: int  # items without text


@contextmanager
def collected(benchmarks: tuple[Source, ...], params: CollectParams, raw: Path) -> Iterator[list[Benchmark]]:
    """The benchmarks, read and cleaned by the code of stage collect, in a temporary folder by the corpus."""
    params = params.model_copy(update={"min_document_bytes": 1, "filters": _NO_FILTERS, "dedup": "none"})
    scratch = raw.with_name(".benchmarks.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
    try:
        yield [_collect_one(i, source, params, scratch / f"{i}") for i, source in enumerate(benchmarks)]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _collect_one(number: int, source: Source, params: CollectParams, folder: Path) -> Benchmark:
    """Raises InputError if the benchmark cannot be read or has no text."""
    description = _description(source)
    try:
        numbers = folder.with_suffix(".npy")
        of_source = params.model_copy(update={"sources": (source,)})
        counts = collect(of_source, folder, stage="split", numbers=numbers)
    except InputError as error:
        problem = str(error).replace("collect.sources", "split.benchmarks")
        raise InputError(f"split.benchmarks.{number}: {description}: {problem}") from error
    n_rejected = counts["documents_in"] - counts["documents"]
    return Benchmark(description, shard_paths(folder), np.load(numbers), n_rejected)


def _description(source: Source) -> str:
    """Kind and place of a benchmark."""
    keys = ("paths", "url", "dataset", "name", "split", "package")
    values = [getattr(source, key, None) for key in keys]
    places = [", ".join(value) if isinstance(value, tuple) else value for value in values if value]
    return " ".join([source.kind, *places])

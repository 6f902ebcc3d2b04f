"""Benchmarks: texts that train must not contain, from sources and from tasks of `evaluate.tasks`.

They are read and cleaned like training text.

That is NFC, plain line ends, no control characters. No filter applies, no duplicate is removed. In particular,
lines that a filter drops from train are kept: train may contain their words in another line.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gptpipe.base.parquet import new_parquet
from gptpipe.collect.cleaning import clean
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams, FilterParams, Source
from gptpipe.formats.corpus import shard_path, shard_paths
from gptpipe.shell.errors import InputError

_NO_FILTERS = FilterParams.model_validate(
    {
        **dict.fromkeys(FilterParams.model_fields),
        "drop_lines_with": (),
        "drop_lines_unfinished": False,
        "phrases": (),
    }
)


_TEXT = pa.schema([("text", pa.string())])

Tasks = Mapping[str, Iterable[str]]  # the text of each document, by the name of the task


class Benchmark(NamedTuple):
    """One benchmark on disk."""

    group: str  # its name in the report
    description: str
    shards: list[Path]  # as of a corpus
    numbers: npt.NDArray[np.int64]  # of the item of each document in the shards, in the source and from 1
    n_rejected: int  # items without text


@contextmanager
def collected(
    benchmarks: tuple[Source, ...], tasks: Tasks, params: CollectParams, raw: Path
) -> Iterator[list[Benchmark]]:
    """The benchmarks, read and cleaned by the code of stage collect, in a temporary folder by the corpus."""
    params = params.model_copy(update={"min_document_bytes": 1, "filters": _NO_FILTERS, "dedup": "none"})
    scratch = raw.with_name(".benchmarks.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
    try:
        of_sources = [
            _collect_one(f"benchmark-{i}", f"split.benchmarks.{i}", source, params, scratch / f"{i}")
            for i, source in enumerate(benchmarks)
        ]
        of_tasks = [
            _clean_task(name, items, params, scratch / f"task-{i}")
            for i, (name, items) in enumerate(tasks.items())
        ]
        yield [*of_sources, *of_tasks]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _clean_task(name: str, items: Iterable[str], params: CollectParams, folder: Path) -> Benchmark:
    """The documents of a task as a benchmark. Raises InputError if none has a text."""
    cleaned = clean(list(items), params)
    texts = [text for text in cleaned if isinstance(text, str)]
    if not texts:
        raise InputError(f"evaluate.tasks: {name}: no document has a text; fix the task, or remove it")
    path = shard_path(folder, 0)
    with new_parquet(path, _TEXT) as rows:
        rows.extend(pa.RecordBatch.from_pydict({"text": texts}, _TEXT))
    numbers = np.flatnonzero([isinstance(text, str) for text in cleaned]) + 1
    return Benchmark(f"task-{name}", f"task {name}", [path], numbers, len(cleaned) - len(texts))


def _collect_one(group: str, place: str, source: Source, params: CollectParams, folder: Path) -> Benchmark:
    """Raises InputError if the benchmark cannot be read or has no text; `place` is its name in params.yaml."""
    description = source.description
    try:
        numbers = folder.with_suffix(".npy")
        of_source = params.model_copy(update={"sources": (source,)})
        counts = collect(of_source, folder, stage="split", numbers=numbers)
    except InputError as error:
        problem = str(error).replace("collect.sources", "split.benchmarks")
        raise InputError(f"{place}: {description}: {problem}") from error
    n_rejected = counts["documents_in"] - counts["documents"]
    return Benchmark(group, description, shard_paths(folder), np.load(numbers), n_rejected)

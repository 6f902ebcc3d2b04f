"""`gptpipe data`: describes the data as far as the stages have run, in reports/data.md and reports/data.svg."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import MANIFEST, Manifest, read_manifest
from gptpipe.base.pages import render_markdown, snippet
from gptpipe.evaluate.charts import bar_chart, length_histogram
from gptpipe.formats.corpus import shard_paths, verify_corpus
from gptpipe.formats.overlaps import read_overlaps
from gptpipe.shell.errors import IntegrityError

_N_SHOWN = 3  # longest, shortest and random documents, of each
_N_CHARACTERS = 300  # shown of a document


def write_page(root: Path, seed: int) -> str:
    """Write reports/data.md and reports/data.svg below `root`, and return the page. Needs stage collect only.

    In memory: 9 bytes per document, and one shard. Raises IntegrityError if nothing is collected, or if the
    corpus or a report is damaged.
    """
    raw = verify_corpus(root / "data/raw")
    reports = root / "reports"
    overlaps = read_overlaps(reports / "split.json")
    rejections = _read_rejections(reports / "collect.md")
    shards = shard_paths(root / "data/raw")
    columns = [
        pq.read_table(shard, columns=["source", "n_bytes"], read_dictionary=["source"]) for shard in shards
    ]
    documents = pa.concat_tables(columns).unify_dictionaries()
    lengths = documents["n_bytes"].to_numpy()
    upper_bounds, n_documents = length_histogram(lengths)
    histogram = {f"{bound:,}": n for bound, n in zip(upper_bounds.tolist(), n_documents.tolist(), strict=True)}
    page = render_markdown(
        Path(__file__).with_name("data.jinja"),
        made=_counts_by_stage(root / "data", raw),
        sources=documents.group_by("source").aggregate([("n_bytes", "count"), ("n_bytes", "sum")]).to_pylist(),
        histogram=histogram,
        overlaps=overlaps,
        rejections=rejections,
        shown=_example_documents(shards, [table.num_rows for table in columns], lengths, seed),
    )
    chart = bar_chart("documents of at most this number of bytes", histogram)
    write_bytes(reports / "data.svg", chart.encode())
    write_bytes(reports / "data.md", page.encode())
    return page


def log_page(page: str, run_file: Path) -> None:
    """Log the page to the run that `run_file`, reports/mlflow_run.json, names, if both exist.

    Raises IntegrityError, StoreError.
    """
    if not run_file.exists():
        return
    # Imported here, because MLflow takes seconds.
    from gptpipe.record.store import RunWriter, connect, find_run, read_run_id, store_errors

    with store_errors():
        run_id = find_run(connect(), read_run_id(run_file))
        if run_id:  # the store of a fresh clone has no such run
            RunWriter(run_id).write(("text", ["data.md", page]))


def _counts_by_stage(data: Path, raw: Manifest) -> dict[str, dict[str, Any]]:
    """Folder name -> counts of its manifest. Folders that were made from another corpus are left out."""
    counts = {"raw": raw.counts}
    for name in ("tokens", "split"):
        if (data / name / MANIFEST).exists():
            manifest = read_manifest(data / name)
            if manifest.made_from.get("raw") == raw.digest:
                counts[name] = manifest.counts
    return counts


def _read_rejections(path: Path) -> str:
    """reports/collect.md without its heading; empty if there is no such file. Raises IntegrityError."""
    try:
        return path.read_bytes().decode().partition("\n\n")[2]
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; `dvc repro` restores it") from error
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: damaged, not UTF-8; `dvc repro` restores it") from error


def _example_documents(
    shards: list[Path], n_rows: list[int], lengths: npt.NDArray[np.int64], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """The longest, the shortest and some random documents. `n_rows`: documents of each shard."""
    order = np.argsort(lengths, kind="stable")
    n_random = min(_N_SHOWN, len(lengths))
    random = np.sort(np.random.default_rng(seed).choice(len(lengths), n_random, replace=False))
    indices = {
        "longest": order[::-1][:_N_SHOWN].tolist(),
        "shortest": order[:_N_SHOWN].tolist(),
        f"drawn by seed {seed}": random.tolist(),
    }
    documents = _read_documents(shards, n_rows, {i for group in indices.values() for i in group})
    return {name: [documents[i] for i in group] for name, group in indices.items()}


def _read_documents(shards: list[Path], n_rows: list[int], wanted: set[int]) -> dict[int, dict[str, Any]]:
    """Id, source, size and the beginning of the text of the documents with these indices in the corpus."""
    documents: dict[int, dict[str, Any]] = {}
    starts = np.cumsum([0, *n_rows]).tolist()
    for shard, start, end in zip(shards, starts[:-1], starts[1:], strict=True):
        indices = sorted(i for i in wanted if start <= i < end)
        if not indices:
            continue
        table = pq.read_table(shard, columns=["id", "source", "n_bytes", "text"])
        rows = table.take([i - start for i in indices]).to_pylist()
        for i, row in zip(indices, rows, strict=True):
            beginning = snippet(row["text"], _N_CHARACTERS)
            documents[i] = {**row, "text": beginning}
    return documents

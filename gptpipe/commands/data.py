"""What the data is like, as far as the pipeline has come: `gptpipe data`, reports/data.md and its picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gptpipe.base.files import write_bytes
from gptpipe.base.manifest import MANIFEST, read_manifest
from gptpipe.base.pages import render_markdown, snippet
from gptpipe.evaluate.charts import bar_chart, length_histogram
from gptpipe.formats.corpus import shard_paths, verify_corpus

_SHOWN, _CHARACTERS = 3, 300  # longest, shortest and random documents; of each


def view_data(root: Path, seed: int) -> str:
    """Write reports/data.md and reports/data.svg below `root`, and return the page. Needs stage collect alone.

    In memory: 9 bytes per document, and a shard. Raises IntegrityError where nothing is collected, or it is damaged.
    """
    raw = verify_corpus(root / "data/raw")
    made = {"raw": raw.counts}
    for name in ("tokens", "split"):
        if (root / "data" / name / MANIFEST).exists():
            later = read_manifest(root / "data" / name)
            if later.made_from.get("raw") == raw.digest:  # not of an older corpus
                made[name] = later.counts
    shards = shard_paths(root / "data/raw")
    columns = [pq.read_table(shard, columns=["source", "n_bytes"], read_dictionary=["source"]) for shard in shards]
    documents = pa.concat_tables(columns).unify_dictionaries()
    lengths = documents["n_bytes"].to_numpy()
    order = np.argsort(lengths, kind="stable")
    drawn = np.sort(np.random.default_rng(seed).choice(len(lengths), min(_SHOWN, len(lengths)), replace=False))
    shown = {"longest": order[::-1][:_SHOWN], "shortest": order[:_SHOWN], f"drawn by seed {seed}": drawn}
    texts = _texts(shards, [table.num_rows for table in columns], set(np.concatenate(list(shown.values())).tolist()))
    upper_bounds, counts = length_histogram(lengths)
    histogram = {f"{bound:,}": count for bound, count in zip(upper_bounds.tolist(), counts.tolist(), strict=True)}
    sources = documents.group_by("source").aggregate([("n_bytes", "count"), ("n_bytes", "sum")]).to_pylist()
    reports = root / "reports"
    overlap = json.loads((reports / "split.json").read_bytes()) if (reports / "split.json").exists() else None
    lost = (reports / "collect.md").read_text(encoding="utf-8") if (reports / "collect.md").exists() else ""
    page = render_markdown(
        Path(__file__).with_name("data.md.jinja"),
        made=made, sources=sources, histogram=histogram, overlap=overlap, lost=lost.partition("\n\n")[2],
        shown={name: [texts[i] for i in rows.tolist()] for name, rows in shown.items()},
    )  # fmt: skip
    write_bytes(reports / "data.svg", bar_chart("documents of up to so many bytes", histogram).encode())
    write_bytes(reports / "data.md", page.encode())
    return page


def _texts(shards: list[Path], sizes: list[int], wanted: set[int]) -> dict[int, dict[str, Any]]:
    """Id, source, bytes and the first of the text of some rows of the corpus, by number."""
    found: dict[int, dict[str, Any]] = {}
    for shard, start, size in zip(shards, np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
        rows = sorted(i for i in wanted if start <= i < start + size)
        if rows:
            table = pq.read_table(shard, columns=["id", "source", "n_bytes", "text"])
            for i, row in zip(rows, table.take([i - start for i in rows]).to_pylist(), strict=True):
                found[i] = {**row, "text": snippet(row["text"], _CHARACTERS)}
    return found

"""datatrove on the text of `benchmarks.data_plane`: exact deduplication and tokenizing, as documented.

    python datatrove_peer.py TASK FOLDER WORKERS

TASK is `versions`, `dedup` or `tokenize`. Runs in a Python that has `datatrove[processing,io]` and `orjson`,
without gptpipe. Downloads nothing: FOLDER contains `texts/*.jsonl` and `tokenizer.json`. Prints the wall
seconds, without imports.
"""

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import ParquetWriter
from loguru import logger


def content(document: Document) -> str:
    text: str = document.text
    return text


def deduplicate(folder: Path, workers: int) -> None:
    """Three steps, each a pass with `workers` tasks; then Parquet with zstd, as gptpipe writes it."""
    config = ExactDedupConfig(content_getter=content)
    signatures, duplicates = str(folder / "signatures"), str(folder / "duplicates")
    reader = JsonlReader(str(folder / "texts"))
    run("1", folder, workers, [reader, ExactDedupSignature(signatures, config, finder_workers=workers)])
    run("2", folder, workers, [ExactFindDedups(signatures, duplicates, config)])
    writer = ParquetWriter(str(folder / "output"), compression="zstd")
    run("3", folder, workers, [reader, ExactDedupFilter(duplicates, config), writer])


def tokenize(folder: Path, workers: int) -> None:
    """Read the texts, and write their tokens in the order of the texts."""
    tokenizer = DocumentTokenizer(
        str(folder / "tokenized"),
        str(folder / "tokenizer.json"),
        eos_token="<|endoftext|>",
        shuffle_documents=False,
    )
    run("tokenize", folder, workers, [JsonlReader(str(folder / "texts")), tokenizer])


def run(name: str, folder: Path, workers: int, pipeline: list[PipelineStep]) -> None:
    logs = str(folder / "logs" / name)
    LocalPipelineExecutor(
        pipeline, tasks=workers, workers=workers, logging_dir=logs, skip_completed=False
    ).run()


def main() -> None:
    task, folder, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    logger.remove()
    if task == "versions":
        print(", ".join(f"{name} {version(name)}" for name in ("datatrove", "tokenizers", "pyarrow")))
        return
    started = time.perf_counter()
    (deduplicate if task == "dedup" else tokenize)(folder, workers)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()

"""Speed of tokenize beside the usual tools, on the same text in the same run.

    python -m benchmarks.encoding_speed

The text is the docstrings of this machine's Python, in documents of 100 and of 4,000 characters, with the
encoding `gpt2` and with one trained on the text. gptpipe reads and writes Parquet; the other programs get texts
in memory and discard their ids. All take turns, and the best round counts. Numbers are ratios to a
single-process loop of `tiktoken.encode_ordinary`, and to the physical limit, which is tiktoken on all cores
without file work: on a shared machine only ratios can be compared. `tokenize` gets a trained tokenizer; the row
below it includes the training. Takes a quarter of an hour on two idle cores. The other stages, CPU seconds and
memory: `benchmarks.data_plane`.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.collect.python_text import python_docs
from gptpipe.formats.hf_tokenizer import to_tokenizer_json
from gptpipe.formats.tokenizer import PATTERN, Tokenizer
from gptpipe.params import load_params
from gptpipe.shell.environment import n_workers
from gptpipe.tokenize import encode
from gptpipe.tokenize.params import TokenizeParams
from gptpipe.tokenize.tokenizers import build_tokenizer, train_tokenizer

VOCAB_SIZE = 4096
PARTS: list[list[str]] = []  # of the texts, one for each core
SPLIT = load_params().split.fractions
LOOP, LIMIT = "tiktoken, one process", "tiktoken, all cores, no files"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="of text; shards hold 8")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    print(f"{platform.platform()}, {n_workers()} workers, {options.megabytes} MB of text\n")
    print(
        "| documents | encoding | program | MB/s | times the tiktoken loop | of the limit |\n"
        "|---|---|---|---|---|---|"
    )
    for length in (100, 4000):
        texts = make_texts(length, options.megabytes * 1_000_000)
        for encoding in ("gpt2", "trained"):
            with tempfile.TemporaryDirectory() as folder:
                rows = programs(Path(folder), texts, encoding)
                seconds = best_of(rows, options.rounds)
            for name, best in seconds.items():
                ratio, share = (seconds[other] / best for other in (LOOP, LIMIT))
                rate = f"{sum(map(len, texts)) / best / 1e6:.1f}" if "training alone" not in name else ""
                print(
                    f"| {length} characters | {encoding} | {name} | {rate} | {ratio:.2f} | {share:.0%} |",
                    flush=True,
                )


def make_texts(length: int, n_bytes: int) -> list[str]:
    """Pieces of docstrings of `length` characters, chosen with a fixed seed."""
    everything = "\n".join(python_docs())
    random_ = random.Random(0)
    starts = [random_.randrange(len(everything) - length) for _ in range(n_bytes // length)]
    return [everything[start : start + length] for start in starts]


def programs(folder: Path, texts: list[str], encoding: str) -> dict[str, Callable[[], object]]:
    """The programs to compare, by name."""
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet", compression="zstd")
    section = tokenize_params(encoding)
    collect(collect_params(folder), folder / "raw")
    encode.tokenize(folder / "raw", folder / "tokens", section, SPLIT, 0)
    tokenizer = Tokenizer.load(folder / "tokens/tokenizer")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(tokenizer)))
    table = datasets.Dataset.from_dict({"text": texts})
    PARTS[:] = [texts[i :: n_workers()] for i in range(n_workers())]
    # Forked: it has the texts before the clock starts.
    pool = ProcessPoolExecutor(n_workers(), get_context("fork"))
    tokenizer_folder = folder / "tokenizer"
    tokenizer.save(tokenizer_folder)
    list(pool.map(part_loop, range(n_workers()), [tokenizer_folder] * n_workers()))

    def encode_rows(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": [tokenizer.encode(text) for text in rows["text"]]}

    def tokenize_with(build: Callable[..., Tokenizer]) -> None:
        with mock.patch.object(encode, "build_tokenizer", build):
            encode.tokenize(folder / "raw", folder / "tokens", section, SPLIT, 0)

    def training(trainer: Callable[[], object]) -> dict[str, Callable[[], object]]:
        if encoding == "gpt2":
            return {}
        return {
            "gptpipe tokenize, training included": lambda: tokenize_with(build_tokenizer),
            "rustbpe, training alone": lambda: train_tokenizer(texts, VOCAB_SIZE),
            "tokenizers, training alone": trainer,
        }

    def their_training() -> None:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, as_bytes])
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)

    return {
        LOOP: lambda: loop(texts, tokenizer_folder),
        LIMIT: lambda: list(pool.map(part_loop, range(n_workers()), [tokenizer_folder] * n_workers())),
        "gptpipe tokenize, Parquet to Parquet": lambda: tokenize_with(lambda *_: tokenizer),
        "tokenizers encode_batch": lambda: theirs.encode_batch(texts),
        "datasets.map of tiktoken": lambda: table.map(
            encode_rows, batched=True, load_from_cache_file=False, num_proc=n_workers()
        ),
        **training(their_training),
    }


def collect_params(folder: Path) -> CollectParams:
    source = {"kind": "parquet", "paths": (str(folder / "texts.parquet"),)}
    section = load_params().collect.model_dump() | {
        "sources": (source,),
        "dedup": "exact",
        "min_document_bytes": 1,
    }
    return CollectParams.model_validate(section)


def tokenize_params(encoding: str) -> TokenizeParams:
    return load_params().tokenize.model_copy(update={"encoding": encoding, "vocab_size": VOCAB_SIZE})


def loop(texts: list[str], tokenizer_folder: Path) -> int:
    tokenizer = Tokenizer.load(tokenizer_folder)
    return sum(len(tokenizer.encoding.encode_ordinary(text)) for text in texts)


def part_loop(part: int, tokenizer_folder: Path) -> int:
    return loop(PARTS[part], tokenizer_folder)


def best_of(rows: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    seconds = dict.fromkeys(rows, float("inf"))
    for _ in range(rounds):
        for name, work in rows.items():
            started = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()

"""Tokenize, collect and split beside what people use instead, on the same text, in one run.

    python -m benchmarks.data_plane

Text of this machine's Python (docstrings), in documents of 100 and of 4,000 characters, in the encoding `gpt2` and in
one trained on it. Ours reads and writes Parquet; the others are given texts in memory and throw their ids away. All
take turns, and the best of the rounds counts. Figures are ratios to a single-process loop of
`tiktoken.encode_ordinary`: on a shared machine nothing else can be compared. About five minutes.
"""

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import tokenizers

from gptpipe.config import CollectParams, SplitParams, TokenizeParams, load_params
from gptpipe.corpus.collect import collect
from gptpipe.corpus.python_docs import python_docs
from gptpipe.environment import n_workers
from gptpipe.tokens.encode import tokenize
from gptpipe.tokens.huggingface import to_tokenizer_json
from gptpipe.tokens.streams import split
from gptpipe.tokens.tokenizer import PATTERN, Tokenizer, train_tokenizer

VOCAB_SIZE = 4096
PARTS: list[list[str]] = []  # of the texts, one for each core
SPLIT = SplitParams(val_fraction=0.05, test_fraction=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=16, help="of text")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    print(f"{platform.platform()}, {n_workers()} workers, {options.megabytes} MB of text\n")
    print("| documents | encoding | program | times the tiktoken loop |\n|---|---|---|---|")
    for length in (100, 4000):
        texts = make_texts(length, options.megabytes * 1_000_000)
        for encoding in ("gpt2", "trained"):
            with tempfile.TemporaryDirectory() as folder:
                rows = programs(Path(folder), texts, encoding)
                seconds = best_of(rows, options.rounds)
            for name, best in seconds.items():
                ratio = seconds["tiktoken, one process"] / best
                print(f"| {length} characters | {encoding} | {name} | {ratio:.2f} |", flush=True)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"\nlargest resident process, texts and peers in it: {peak // 1024} MiB")


def make_texts(length: int, n_bytes: int) -> list[str]:
    """Pieces of docstrings of `length` characters, drawn by a fixed seed."""
    everything = "\n".join(python_docs())
    random_ = random.Random(0)
    starts = [random_.randrange(len(everything) - length) for _ in range(n_bytes // length)]
    return [everything[start : start + length] for start in starts]


def programs(folder: Path, texts: list[str], encoding: str) -> dict[str, Callable[[], object]]:
    """What takes turns, by name."""
    lines = folder / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    section = load_params().collect.model_dump() | {"sources": ({"kind": "jsonl", "paths": (str(lines),)},)}
    params = CollectParams.model_validate(section | {"dedup": "exact", "min_document_bytes": 1})
    tokenize_params = TokenizeParams(encoding=encoding, vocab_size=VOCAB_SIZE)
    collect(params, folder / "raw")
    tokenize(folder / "raw", folder / "tokens", tokenize_params, SPLIT, 0)
    tokenizer = Tokenizer.load(folder / "tokens/tokenizer")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(tokenizer)))
    table = datasets.Dataset.from_dict({"text": texts})
    PARTS[:] = [texts[i :: n_workers()] for i in range(n_workers())]
    pool = ProcessPoolExecutor(n_workers(), get_context("fork"))  # forked: it has the texts before the clock starts
    tokenizer_folder = folder / "tokenizer"
    tokenizer.save(tokenizer_folder)
    list(pool.map(part_loop, range(n_workers()), [tokenizer_folder] * n_workers()))

    def encode_rows(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": [tokenizer.encode(text) for text in rows["text"]]}

    def training(trainer: Callable[[], object]) -> dict[str, Callable[[], object]]:
        return {} if encoding == "gpt2" else {"rustbpe, training alone": lambda: train_tokenizer(texts, VOCAB_SIZE),
                                              "tokenizers, training alone": trainer}  # fmt: skip

    def their_training() -> None:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, as_bytes])
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(texts, trainer)

    return {
        "tiktoken, one process": lambda: loop(texts, tokenizer_folder),
        "tiktoken, all cores, no files": lambda: list(
            pool.map(part_loop, range(n_workers()), [tokenizer_folder] * n_workers())
        ),
        "gptpipe tokenize, Parquet to Parquet, training included": lambda: tokenize(
            folder / "raw", folder / "tokens", tokenize_params, SPLIT, 0
        ),
        "gptpipe collect, exact": lambda: collect(params, folder / "raw2"),
        "gptpipe split": lambda: split(folder / "tokens", folder / "split", SPLIT, 0),
        "tokenizers encode_batch": lambda: theirs.encode_batch(texts),
        "datasets.map of tiktoken": lambda: table.map(
            encode_rows, batched=True, load_from_cache_file=False, num_proc=n_workers()
        ),
        **training(their_training),
    }  # fmt: skip


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

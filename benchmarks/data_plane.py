"""Speed of collect, tokenize and split, what their parent process costs, and datatrove on the same text.

    python -m benchmarks.data_plane [--datatrove PYTHON]

The text is the docstrings of this machine's Python in JSON lines, in documents of 100 and of 4,000 characters.
They are pieces that overlap, so nearly each has near-duplicates; with `--words` hardly any has one.
Each stage runs in a new process on a quarter of the text and on all of it. CPU seconds per GB are the
difference of both, so starting processes does not count. Wall time is that of the whole text, without imports.
The best round counts.

Parent CPU is that of the process that divides the work; it limits the speed on any number of cores. The limit
for n cores is the lower of n times the rate of one core, and the rate at which the parent is always busy.

The physical limit is the least work on all cores of this machine, on texts in memory and without Python
between: SHA-256 and zstd of the texts for collect, tiktoken for tokenize, reading the text and the tokens for
split.

datatrove needs a Python of its own, with `datatrove[processing,io]` and `orjson`; see
benchmarks/datatrove_peer.py. Takes about an hour on two idle cores, and 1.5 GB on the disk of the temporary
folder (TMPDIR).
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.stage import RAW, TEXTS, TOKENS
from gptpipe.collect.python_text import python_docs
from gptpipe.formats.corpus import shard_paths
from gptpipe.formats.hf_tokenizer import to_tokenizer_json
from gptpipe.formats.token_shards import token_shard_paths
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.shell.environment import n_workers

N_FILES = 16  # of all texts; a quarter of the files is a quarter of the text
CORES = (8, 64, 512)
PEER = Path(__file__).with_name("datatrove_peer.py")
_PR_SET_CHILD_SUBREAPER = 36
HEAD = [
    "documents",
    "program",
    "MB/s",
    "of the physical limit",
    "parent CPU s/GB",
    "all CPU s/GB",
    *(f"limit, {n} cores, MB/s" for n in CORES),
    "resident MiB",
]


class Usage(NamedTuple):
    """Of a process and all its descendants."""

    wall: float  # seconds, without the imports of the process
    parent: float | None  # CPU seconds of the process itself, without its imports
    total: float  # CPU seconds of all
    peak: int  # resident MiB; pages that processes share count once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=int, default=256, help="of text; 256 or more, for a quarter to have parts"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 4000], help="characters per document")
    parser.add_argument("--words", action="store_true", help="documents of random words in place of pieces")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--encoding", default="gpt2", help="as tokenize.encoding")
    parser.add_argument("--datatrove", metavar="PYTHON", help="a Python interpreter that has datatrove")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # to wait for processes whose parent has ended
    peer = ""
    if options.datatrove:
        versions = subprocess.check_output([options.datatrove, PEER, "versions", ".", "1"], text=True)
        peer = f", {versions.strip()}"
    text = f"{options.megabytes} MB of text"
    print(f"{platform.platform()}, {n_workers()} workers, {text}, pyarrow {pa.__version__}{peer}")
    print(f"\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for length in options.lengths:
        with tempfile.TemporaryDirectory() as name:
            for program, row in measure(Path(name), length, options):
                kind = ", random words" if options.words else ""
                print(f"| {length} characters{kind} | {program} | {' | '.join(row)} |", flush=True)


def measure(folder: Path, length: int, options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Name and cells of each row for one size of documents."""
    folders = [folder / "quarter", folder / "whole"]
    n_bytes = write_texts(folders, length, options.megabytes * 1_000_000, options.words)
    difference = n_bytes[1] - n_bytes[0]

    def compare(command: Callable[[Path], list[str]]) -> tuple[float, Usage, Usage]:
        part, whole = (best([run(command(project)) for _ in range(options.rounds)]) for project in folders)
        return n_bytes[1] / whole.wall / 1e6, part, whole

    for stage, dedup in (("collect", "near"), ("collect", "exact"), ("tokenize", "exact"), ("split", "exact")):
        rate, *usages = compare(partial(stage_command, stage, options.encoding, dedup))
        name = f"gptpipe {stage}, {dedup}" if stage == "collect" else f"gptpipe {stage}"
        seconds = least_seconds(stage, folders[1])
        yield name, cells(rate, n_bytes[1] / seconds / 1e6, usages, difference)
        if options.datatrove and (stage, dedup) in (("collect", "exact"), ("tokenize", "exact")):
            task = "dedup" if stage == "collect" else "tokenize"
            if task == "tokenize":
                write_tokenizer(folders)
            rate, *usages = compare(partial(peer_command, options.datatrove, task))
            yield f"datatrove, {task}", cells(rate, n_bytes[1] / seconds / 1e6, usages, difference)


def write_texts(folders: list[Path], length: int, n_bytes: int, are_words: bool) -> list[int]:
    """Documents of `length` characters, chosen with a fixed seed; a quarter of them in the first folder.

    They are pieces of docstrings, or random words of them. Returns the bytes of text in each folder.
    """
    everything = "\n".join(python_docs())
    words = everything.split()
    random_ = random.Random(0)
    sizes = [0, 0]
    for folder in folders:
        (folder / TEXTS).mkdir(parents=True)
    for number in range(N_FILES):
        n_documents = n_bytes // length // N_FILES
        if are_words:
            texts = [" ".join(random_.choices(words, k=length // 3))[:length] for _ in range(n_documents)]
        else:
            starts = [random_.randrange(len(everything) - length) for _ in range(n_documents)]
            texts = [everything[start : start + length] for start in starts]
        for i in (0, 1) if number < N_FILES // 4 else (1,):
            with (folders[i] / TEXTS / f"{number:02}.jsonl").open("w") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            sizes[i] += sum(len(text.encode()) for text in texts)
    return sizes


def write_tokenizer(folders: list[Path]) -> None:
    """tokenizer.json, which makes the same tokens as the stage tokenize."""
    for folder in folders:
        content = to_tokenizer_json(Tokenizer.load(folder / TOKENS / TOKENIZER))
        (folder / "tokenizer.json").write_text(json.dumps(content))


def stage_command(stage: str, encoding: str, dedup: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.stage", stage, str(folder), encoding, dedup]


def peer_command(python: str, task: str, folder: Path) -> list[str]:
    return [python, str(PEER), task, str(folder), str(n_workers())]


def run(command: list[str]) -> Usage:
    """Run a program that prints its wall seconds, or the Usage fields that it knows, in its last line."""
    peak = 0
    children_before, cpu_before = _children(), _cpu_of_children()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                alive = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(member.memory_full_info().pss for member in alive) >> 20)
            time.sleep(0.1)
        assert process.stdout is not None
        output = process.stdout.read()
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read()}")
    while orphans := _children() - children_before:
        for pid in orphans:
            os.waitpid(pid, 0)
    result = json.loads(output.splitlines()[-1])
    fields = result if isinstance(result, dict) else {"wall": result, "parent": None}
    return Usage(**fields, total=_cpu_of_children() - cpu_before, peak=peak)


def best(rounds: list[Usage]) -> Usage:
    """The least time of each kind, and the highest peak."""
    parents = [usage.parent for usage in rounds if usage.parent is not None]
    return Usage(
        wall=min(usage.wall for usage in rounds),
        parent=min(parents, default=None),
        total=min(usage.total for usage in rounds),
        peak=max(usage.peak for usage in rounds),
    )


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cells(rate: float, limit: float, usages: list[Usage], n_bytes: int) -> list[str]:
    """The cells of a row. `n_bytes` of text are the difference between both runs."""
    part, whole = usages
    total = (whole.total - part.total) / n_bytes * 1e9
    row = [f"{rate:.1f}", f"{rate / limit:.0%}"]
    if whole.parent is None or part.parent is None:
        return [*row, "", f"{total:.1f}", *([""] * len(CORES)), f"{whole.peak}"]
    parent = max((whole.parent - part.parent) / n_bytes * 1e9, 0.001)
    limits = [min(n / total, 1 / parent) * 1000 for n in CORES]
    return [*row, f"{parent:.2f}", f"{total:.1f}", *(f"{limit:,.0f}" for limit in limits), f"{whole.peak}"]


def least_seconds(stage: str, folder: Path) -> float:
    """Wall seconds of the physical limit of a stage, on all cores."""
    files: dict[str, list[Path]] = {
        "collect": shard_paths(folder / RAW),
        "tokenize": shard_paths(folder / RAW),
        "split": [*shard_paths(folder / RAW), *token_shard_paths(folder / TOKENS)],
    }
    with ProcessPoolExecutor(n_workers(), get_context("spawn")) as pool:
        started = time.perf_counter()
        seconds = list(pool.map(partial(_least_work, stage, folder), files[stage], chunksize=1))
        wall = time.perf_counter() - started
    return min(wall, sum(seconds) / n_workers())  # without the start of the processes


def _least_work(stage: str, folder: Path, file: Path) -> float:
    """Seconds of the least work on one shard."""
    if stage == "split":
        started = time.perf_counter()
        column = "tokens" if "tokens" in pq.read_schema(file).names else "text"
        pq.read_table(file, columns=[column], use_threads=False)
        return time.perf_counter() - started
    texts = pq.read_table(file, columns=["text"])["text"].to_pylist()
    if stage == "tokenize":
        encode = Tokenizer.load(folder / TOKENS / TOKENIZER).encoding.encode_ordinary
        started = time.perf_counter()
        for text in texts:
            encode(text)
        return time.perf_counter() - started
    contents = [text.encode() for text in texts]
    started = time.perf_counter()
    for content in contents:
        hashlib.sha256(content).digest()
    pa.compress(b"".join(contents), "zstd")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

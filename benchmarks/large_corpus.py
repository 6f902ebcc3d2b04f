"""Resident memory and speed of the data stages as the corpus grows.

    python -m benchmarks.large_corpus [--gigabytes 0.03 0.3] [--encoding gpt2]

Each size gets its own project, with documents of 4,000 characters from this machine's Python in one JSON lines
file. The stages run as under `dvc repro`. Resident memory is the peak of a stage and all its processes
together, sampled ten times a second; pages of mapped files count too. Needs twice the size on the disk of the
temporary folder (TMPDIR).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from benchmarks import machine
from benchmarks.default_run import copy_project
from gptpipe.collect.python_text import python_docs

STAGES = ("collect", "tokenize", "split")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gigabytes", type=float, nargs="+", default=[0.03, 0.3], help="of text, one run for each"
    )
    parser.add_argument("--encoding", default="gpt2", help="as tokenize.encoding")
    options = parser.parse_args()
    print(f"{machine.describe()}, encoding {options.encoding}\n")
    print("| GB of text | stage | MB/s | resident MB | times that of the first size |\n|---|---|---|---|---|")
    first: dict[str, int] = {}
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as name:
            project = copy_project(Path(name))
            n_bytes = write_text(project / "text.jsonl", gigabytes)
            set_params(project / "params.yaml", options.encoding)
            for stage in STAGES:
                seconds, peak = run(project, stage)
                rate, times = n_bytes / seconds / 1e6, peak / first.setdefault(stage, peak)
                print(f"| {n_bytes / 1e9:.2f} | {stage} | {rate:.1f} | {peak} | {times:.2f} |", flush=True)


def write_text(path: Path, gigabytes: float) -> int:
    """Write distinct documents, chosen with a fixed seed; returns the number of bytes of text."""
    everything = "\n".join(python_docs())
    random_ = random.Random(0)
    n_bytes = n_documents = 0
    with path.open("w") as file:
        while n_bytes < gigabytes * 1e9:
            start = random_.randrange(len(everything) - 4000)
            text = f"{n_documents} {everything[start : start + 4000]}"
            file.write(json.dumps({"text": text}) + "\n")
            n_bytes += len(text.encode())
            n_documents += 1
    return n_bytes


def set_params(path: Path, encoding: str) -> None:
    yaml = YAML()
    params = yaml.load(path)
    params["collect"]["sources"] = [{"kind": "jsonl", "paths": ["text.jsonl"]}]
    params["tokenize"]["encoding"] = encoding
    yaml.dump(params, path)


def run(project: Path, stage: str) -> tuple[float, int]:
    """Wall seconds of a stage, and the peak resident megabytes of its process tree."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", f"stages.{stage}"], cwd=project, stdout=sys.stderr) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                alive = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(member.memory_info().rss for member in alive) >> 20)
            time.sleep(0.1)
    if process.returncode:
        sys.exit(f"stages.{stage} ended with {process.returncode}")
    return time.perf_counter() - started, peak


if __name__ == "__main__":
    main()

"""The default run, PPMd, `xz` and the usual tutorial recipe: bits per byte on the same validation documents.

    python -m benchmarks.default_run

Runs `dvc repro` on the embedded corpus in a fresh copy of the project, stage by stage. Then trains the tutorial
recipe for the wall time of the train stage, on the same documents and cores: GPT-2's vocabulary and
architecture (with our depth and width), dropout 0.1, AdamW at 3e-4, windows of 256 tokens that overlap by half,
batches of 8. Takes about ten minutes.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks import machine
from gptpipe.formats.sides import Side
from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.params import Params, load_params
from gptpipe.tokenize.tokenizers import named_tokenizer
from gptpipe.train.batches import Batches

ROOT = Path(__file__).parents[1]
STAGES = ("collect", "tokenize", "split", "train", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--keep", type=Path, help="run in this new folder, and leave it with its tracking store"
    )
    keep = parser.parse_args().keep
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory() as name:
        project = copy_project(Path(name))
        started = time.perf_counter()
        seconds = {stage: run_stage(project, stage) for stage in STAGES}
        total = time.perf_counter() - started
        found = json.loads((project / "reports/eval.json").read_bytes())
        trained = json.loads((project / "reports/train.json").read_bytes())
        ours, references = found["val"]["bits_per_byte"], found["reference_bits_per_byte"]["val"]
        error = found["val"]["bits_per_byte_standard_error"]
        params = load_params(project / "params.yaml")
        tutorial, steps = tutorial_bits_per_byte(project, params, seconds["train"])
    print(f"{machine.describe()}, transformers {transformers.__version__}")
    stages = ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items())
    print(f"dvc repro, stage by stage: {total:.0f} s ({stages})\n")
    print(
        "| bits per byte on the validation documents | value | ours against it | asked for |\n|---|---|---|---|"
    )
    size = f"{trained['parameters']:,} parameters, {trained['steps']:,} steps"
    print(f"| gptpipe default, {size} | {ours:.4f} ± {error:.4f} | | |")
    for name, key, goal in (("PPMd", "ppmd", "-5%"), ("xz -9e", "xz", "-8%")):
        value = references[key]
        print(f"| {name}, primed with the training text | {value:.4f} | {ours / value - 1:+.1%} | {goal} |")
    recipe = f"tutorial recipe, same wall time, {steps:,} steps"
    print(f"| {recipe} | {tutorial:.4f} | {ours / tutorial - 1:+.1%} | -30% |")


def copy_project(folder: Path) -> Path:
    """Copy the project's files, without the outputs of runs."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if name != "dvc.lock" and (not name.startswith("reports/") or name == "reports/.gitignore"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def run_stage(project: Path, stage: str) -> float:
    """Wall seconds of `dvc repro -s STAGE`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = time.perf_counter()
    subprocess.run(
        ["dvc", "repro", "-s", stage],
        cwd=project,
        env={**os.environ, "PATH": path},
        check=True,
        stdout=sys.stderr,
    )
    return time.perf_counter() - started


def tutorial_bits_per_byte(project: Path, params: Params, seconds: float) -> tuple[float, int]:
    """Train the tutorial recipe for `seconds`; returns bits per byte on the validation documents, and steps."""
    context, batch_size = 256, 8
    gpt2 = named_tokenizer("gpt2")
    train, val = (np.concatenate(list(encoded(project, side, gpt2))) for side in ("train", "val"))
    n_bytes = open_stream(project / "data/split", "val").n_bytes
    torch.manual_seed(params.seed)
    config = transformers.GPT2Config(
        vocab_size=gpt2.vocab_size,
        n_positions=context,
        n_layer=params.model.n_layer,
        n_head=params.model.n_head,
        n_embd=params.model.n_embd,
    )  # dropout is 0.1 by default
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95))
    batches = Batches(
        train, context_length=context, stride=context // 2, batch_size=batch_size, seed=params.seed
    )
    model.train()
    started, step = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        tokens, targets = batches.at(step)
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return bits_per_byte(model, torch.from_numpy(val.astype(np.int64)), context, n_bytes), step


def encoded(project: Path, side: Side, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The documents of one side of the split, encoded with GPT-2's vocabulary."""
    stream = open_stream(project / "data/split", side)
    ours = Tokenizer.load(project / "data/split/tokenizer")
    for offset, n_tokens in zip(stream.documents["offset"], stream.documents["n_tokens"], strict=True):
        yield tokenizer.encode_documents([ours.decode(stream.tokens[offset : offset + n_tokens].tolist())])


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, tokens: torch.Tensor, context: int, n_bytes: int) -> float:
    """Scores every token except the first, in consecutive windows."""
    model.eval()
    nats = 0.0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        logits = model(window[None, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return nats / math.log(2) / n_bytes


if __name__ == "__main__":
    main()

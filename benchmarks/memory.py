"""Peak resident memory of training with GPT-2's vocabulary, beside a plain loop.

    python -m benchmarks.memory

Vocabulary 50,257, batches of 16 x 512 tokens, 4 layers of width 256. Each contender takes two steps in a
separate process. The plain loop is the one of benchmarks.training_speed. The table also shows what a process
holds before it builds a model (Python and torch).
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.training_speed import PlainGPT, ours, peer, stepper
from gptpipe.model.device import keep_freed_memory

SIZES = {"n_layer": 4, "n_head": 4, "n_embd": 256, "context_length": 512}
VOCAB_SIZE, BATCH_SIZE = 50257, 16
CONTENDERS = ("plain loop", "gptpipe", "gptpipe, activation checkpointing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", choices=CONTENDERS, help="one of them, in this process")
    contender = parser.parse_args().contender
    if contender:
        print(*peak(contender))
        return
    print(machine.describe() + "\n")
    print("| | peak resident MB | before the model | of the plain loop's peak |\n|---|---|---|---|")
    plain = 0
    for name in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.memory", "--contender", name]
        result = subprocess.run(
            command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True
        )
        before, after = map(int, result.stdout.split())
        plain = plain or after
        print(f"| {name} | {after:,} | {before:,} | {after / plain:.0%} |")


def peak(contender: str) -> tuple[int, int]:
    """Resident megabytes before the model is built, and at the peak."""
    keep_freed_memory()
    before = resident()
    device = torch.device("cpu")
    if contender == "plain loop":
        step = peer(PlainGPT(SIZES, VOCAB_SIZE), device, torch.float32, False)
    else:
        model = ours(SIZES, "gpt2", VOCAB_SIZE)
        model.activation_checkpointing = "checkpointing" in contender
        step = stepper(model, model.loss, device, torch.float32, False)
    tokens, targets = torch.randint(VOCAB_SIZE, (2, BATCH_SIZE, SIZES["context_length"]))
    step(tokens, targets)
    step(tokens, targets)
    return before, resident()


def resident() -> int:
    """Peak resident set size so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    main()

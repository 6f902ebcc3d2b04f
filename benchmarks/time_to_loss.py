"""Wall time to a validation loss on Tiny Shakespeare, beside nanoGPT's recipe for a laptop.

    python -m benchmarks.time_to_loss TEXT [--seeds 3]

Tokens are characters; the first 90% are for training and the last 10% for validation, as in nanoGPT. The peer
uses the settings of nanoGPT's README for a CPU (4 layers, 4 heads, width 128, context 64, batch 12, AdamW from
1e-3 to 1e-4 along a cosine after 100 steps of warm-up, betas 0.9 and 0.99, no dropout, 2,000 steps), with
`transformers`' GPT-2 and torch's fused AdamW. Its time contains only its steps. Our time is that of a whole
process, from its start to its last validation: first to the given loss, then for as long as the peer needed.
"""

import argparse
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F

from benchmarks import machine
from gptpipe.formats.streams import Stream
from gptpipe.model.device import keep_freed_memory
from gptpipe.model.gpt import GPT
from gptpipe.params import load_params
from gptpipe.score.scoring import score
from gptpipe.train import runtime
from gptpipe.train.batches import Batches
from gptpipe.train.optim import build_optimizers
from gptpipe.train.state import TrainState
from gptpipe.train.step import Plan, optimizer_step

ROOT = Path(__file__).parents[1]
WANTED = 1.88  # nats per character

# What differs from params.yaml.
SHORT: dict[str, dict[str, Any]] = {
    "model": {"context_length": 64, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 128, "n_inner": 352},
    "train": {"batch_size": 16, "lr": 1.6e-2, "warmup_steps": 20, "max_steps": 285},
}
LONG: dict[str, dict[str, Any]] = {
    "model": {"context_length": 128, "n_layer": 3, "n_head": 2, "n_kv_head": 2, "n_embd": 128, "n_inner": 352},
    "train": {"batch_size": 16, "lr": 1e-2, "warmup_steps": 40},  # as many steps as there is time
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--ours", choices=["short", "long"], help="one training of ours in this process")
    parser.add_argument("--seed", type=int, default=0, help="of --ours")
    parser.add_argument(
        "--until", type=float, default=0.0, help="of --ours long: seconds since 1970 when it must end"
    )
    options = parser.parse_args()
    tokens, n_characters = characters(options.text)
    if options.ours:
        settings = SHORT if options.ours == "short" else LONG
        print(train_ours(tokens, n_characters, settings, options.seed, options.until))
        return
    found = []
    for seed in range(options.seeds):
        to_wanted, whole, loss = train_peer(tokens, n_characters, seed)
        short = run_ours(options.text, "short", seed)
        long = run_ours(options.text, "long", seed, whole)
        found.append((to_wanted, whole, loss, *short, *long))
        print(f"seed {seed}: " + ", ".join(f"{value:.3f}" for value in found[-1]), file=sys.stderr)
    columns = list(zip(*found, strict=True))
    times = [machine.spread(columns[i], ".1f") for i in (0, 1, 3, 5)]
    losses = [machine.spread(columns[i]) for i in (2, 4, 6)]
    faster = [row[0] / row[3] for row in found]
    print(f"{machine.describe()}; {options.seeds} seeds, mean ± standard deviation\n")
    print(f"| | seconds to {WANTED} nats per character | seconds in all | validation loss |\n|---|---|---|---|")
    print(f"| nanoGPT's recipe, its steps alone | {times[0]} | {times[1]} | {losses[0]} |")
    print(f"| gptpipe, the whole process | {times[2]} | {times[2]} | {losses[1]} |")
    print(f"| gptpipe in the recipe's time | | {times[3]} | {losses[2]} |\n")
    print(f"{machine.spread(faster, '.1f')} times faster")


def characters(path: Path) -> tuple[npt.NDArray[np.uint16], int]:
    """The text as numbers of its distinct bytes, and the number of distinct bytes."""
    distinct, tokens = np.unique(np.frombuffer(path.read_bytes(), np.uint8), return_inverse=True)
    return tokens.astype(np.uint16), len(distinct)


def run_ours(text: Path, kind: str, seed: int, seconds: float = 0.0) -> tuple[float, float]:
    """Seconds of the whole process, and its validation loss."""
    command = [sys.executable, "-m", "benchmarks.time_to_loss", str(text), "--ours", kind]
    started = time.perf_counter()
    until = time.time() + seconds if seconds else 0.0
    result = subprocess.run(
        [*command, "--seed", str(seed), "--until", str(until)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - started, float(result.stdout)


def train_ours(
    tokens: npt.NDArray[np.uint16], n_characters: int, settings: dict[str, Any], seed: int, until: float
) -> float:
    """Validation loss after `max_steps`, or after as many steps as the time allows."""
    params = load_params(ROOT / "params.yaml")
    model_params = params.model.model_copy(update=settings["model"])
    section = params.train.model_copy(update={"stride": 1, **settings["train"]})
    runtime.be_deterministic()
    keep_freed_memory()
    torch.manual_seed(seed)
    model = GPT(model_params, n_characters)
    n_train = int(0.9 * len(tokens))
    val = Stream(tokens[n_train:], pd.DataFrame({"offset": [0], "n_tokens": [len(tokens) - n_train]}))
    batches = Batches(
        tokens[:n_train],
        context_length=model_params.context_length,
        stride=section.stride,
        batch_size=section.batch_size,
        seed=seed,
    )
    state = TrainState(model, build_optimizers(model, section), section.batch_size)
    plan = Plan(section, section.max_steps or 0, seed, torch.float32, model.loss)
    if until:
        plan = in_time(until, state, batches, val, replace(plan, n_steps=10**6))
    while state.step < plan.n_steps:
        optimizer_step(state, batches, plan)
    scores = score(model, val)
    return float(scores.by_document[0].sum() / scores.by_document[2].sum())


def in_time(until: float, state: TrainState, batches: Batches, val: Stream, plan: Plan) -> Plan:
    """Train until about ten steps remain; returns a plan whose last step and validation end before `until`."""
    started = time.perf_counter()
    score(state.model, val)
    validation = 1.2 * (time.perf_counter() - started)
    started = time.perf_counter()
    while plan.n_steps - state.step > 10:
        optimizer_step(state, batches, plan)
        if state.step % 10 == 0:
            left = until - time.time() - validation - 2.0  # for the end of the process
            rate = state.step / (time.perf_counter() - started)
            plan = replace(plan, n_steps=state.step + max(0, int(0.98 * left * rate)))
    return plan


def train_peer(tokens: npt.NDArray[np.uint16], n_characters: int, seed: int) -> tuple[float, float, float]:
    """Seconds of the steps to the given loss (or to the end) and of all steps, and the last validation loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    context, batch_size, n_steps, n_warmup = 64, 12, 2000, 100
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=n_characters,
        n_positions=context,
        n_layer=4,
        n_head=4,
        n_embd=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        fused=True,
    )
    data = torch.from_numpy(tokens.astype(np.int64))
    n_train = int(0.9 * len(data))
    generator = torch.Generator().manual_seed(seed)
    seconds, to_wanted, loss = 0.0, math.inf, math.inf
    for step in range(n_steps):
        started = time.perf_counter()
        starts = torch.randint(n_train - context, (batch_size,), generator=generator)
        windows = torch.stack([data[s : s + context + 1] for s in starts])
        progress = max(0.0, (step - n_warmup) / (n_steps - n_warmup))
        lr = 1e-4 + 0.5 * (1 + math.cos(math.pi * progress)) * (1e-3 - 1e-4)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / n_warmup)
        logits = model(windows[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        if (step + 1) % 100 == 0 and step >= n_steps // 2:
            loss = validation_loss(model, data[n_train:], context)
            if loss <= WANTED and math.isinf(to_wanted):
                to_wanted = seconds
    return min(to_wanted, seconds), seconds, loss


@torch.no_grad()
def validation_loss(model: torch.nn.Module, data: torch.Tensor, context: int) -> float:
    """Nats per character over consecutive windows of the whole validation text."""
    n = (len(data) - 1) // context
    tokens, targets = data[: n * context].view(n, -1), data[1 : n * context + 1].view(n, -1)
    losses = [
        F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in zip(torch.split(tokens, 64), torch.split(targets, 64), strict=True)
    ]
    return sum(losses) / targets.numel()


if __name__ == "__main__":
    main()

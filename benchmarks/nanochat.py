"""Bits per byte beside nanochat's base_train on a CPU, at equal text, vocabulary, width, depth and wall time.

    git clone https://github.com/karpathy/nanochat CLONE
    python -m benchmarks.nanochat CLONE [--minutes 4] [--seeds 3]

nanochat's network and optimizer (Muon and AdamW) come from the clone. Its script base_train is no module, so
its schedule and its rules for learning rates and weight decay are repeated here. Both trainings get the same
windows of data/split in the same order; nanochat's loader would cut off a third of the tokens. Both are scored
on every validation token but the first. Our time is that of building the network, all steps and the validation.
nanochat's is that of its steps alone, without the compilation.

base_train would choose batches of 64 times our tokens, which leaves a dozen steps. So several batch sizes are
tried, each with several multiples of its learning rates, and the best of all gets the other seeds.
"""

import argparse
import io
import math
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.time_to_loss import in_time
from gptpipe.formats.streams import Stream
from gptpipe.model.gpt import GPT
from gptpipe.params import Params, load_params
from gptpipe.score.metrics import compute_metrics
from gptpipe.score.scoring import score
from gptpipe.train.batches import Batches
from gptpipe.train.inputs import Inputs, load_inputs
from gptpipe.train.optim import build_optimizers
from gptpipe.train.runtime import loss_function
from gptpipe.train.state import TrainState
from gptpipe.train.step import Plan, optimizer_step

MICRO_BATCH_SIZE = 8  # sequences per pass of nanochat
# Defaults of base_train's options.
LEARNING_RATES = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
WEIGHT_DECAY, WARMUP_STEPS, WARMDOWN_FRACTION, FINAL_LR_FRACTION = 0.28, 40, 0.65, 0.05
REFERENCE_BATCH, REFERENCE_DEPTH = 2**19, 12  # tokens and layers for which these defaults are tuned


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    batch_size: int  # sequences, a multiple of MICRO_BATCH_SIZE
    lr_scale: float  # multiple of the learning rates that base_train's rule gives for this batch size


@dataclass(frozen=True)
class Result:
    """The end of one training."""

    n_steps: int
    seconds: float
    bits_per_byte: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="folder of nanochat's repository")
    parser.add_argument("--split", type=Path, default=Path("data/split"))
    parser.add_argument("--minutes", type=float, default=4.0, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of ours and of nanochat's best setting")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32], help="in sequences")
    parser.add_argument("--lr-scales", type=float, nargs="+", default=[4.0, 8.0, 16.0])
    options = parser.parse_args()
    if not (options.clone / "nanochat" / "gpt.py").is_file():
        parser.error(f"{options.clone} has no nanochat/gpt.py; give the folder of a clone of nanochat")
    if any(size < 1 or size % MICRO_BATCH_SIZE for size in options.batch_sizes):
        parser.error(f"--batch-sizes must be multiples of {MICRO_BATCH_SIZE} sequences")
    sys.path.insert(0, str(options.clone))
    params, seconds = load_params(), 60 * options.minutes
    inputs = load_inputs(params, options.split)
    print(machine.describe() + "\n")
    print("| | batch, tokens | times its learning rates | steps | seconds | bits per byte |")
    print("|---|---|---|---|---|---|")
    context = params.model.context_length
    ours = [train_ours(params, inputs, seed, seconds) for seed in range(options.seeds)]
    print(row("gptpipe", params.train.batch_size * context, "", ours), flush=True)
    sweep: dict[Setting, Result] = {}
    for batch_size, lr_scale in product(options.batch_sizes, options.lr_scales):
        setting = Setting(batch_size, lr_scale)
        sweep[setting] = train_nanochat(params, inputs, setting, 0, seconds)
        print(row("nanochat", batch_size * context, f"{lr_scale:g}", [sweep[setting]]), flush=True)
    best = min(sweep, key=lambda setting: sweep[setting].bits_per_byte)
    theirs = [sweep[best]]
    theirs += [train_nanochat(params, inputs, best, seed, seconds) for seed in range(1, options.seeds)]
    print(row("nanochat, best setting", best.batch_size * context, f"{best.lr_scale:g}", theirs))


def row(name: str, batch_tokens: int, lr_scale: str, results: list[Result]) -> str:
    """A row of the table: means over the seeds, and their standard deviation."""
    n_steps = machine.spread([result.n_steps for result in results], ".0f")
    seconds = machine.spread([result.seconds for result in results], ".1f")
    bits = machine.spread([result.bits_per_byte for result in results])
    return f"| {name} | {batch_tokens:,} | {lr_scale} | {n_steps} | {seconds} | {bits} |"


def train_ours(params: Params, inputs: Inputs, seed: int, seconds: float) -> Result:
    """The training of params.yaml, with as many steps as the time allows."""
    started, until = time.perf_counter(), time.time() + seconds
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    section = params.train
    model = GPT(params.model, inputs.tokenizer.vocab_size)
    state = TrainState(model, build_optimizers(model, section), section.batch_size)
    loss = loss_function(model, section, inputs.tokenizer.end_of_text, is_compiled=False)
    batches = batches_of(params, inputs, section.batch_size, seed)
    plan = in_time(until, state, batches, inputs.val, Plan(section, 10**6, seed, torch.float32, loss))
    while state.step < plan.n_steps:
        optimizer_step(state, batches, plan)
    metrics = compute_metrics(score(model, inputs.val, inputs.scoring).by_document, inputs.val.documents)
    return Result(state.step, time.perf_counter() - started, metrics["bits_per_byte"])


def batches_of(params: Params, inputs: Inputs, batch_size: int, seed: int) -> Batches:
    """The training windows of params.yaml in batches of `batch_size` sequences, in the order of `seed`."""
    context, stride = params.model.context_length, params.train.stride
    return Batches(inputs.train.tokens, context_length=context, stride=stride, batch_size=batch_size, seed=seed)


def train_nanochat(params: Params, inputs: Inputs, setting: Setting, seed: int, seconds: float) -> Result:
    """Train nanochat's network on its schedule, which ends after `seconds`."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(seed)
    vocab_size, context = inputs.tokenizer.vocab_size, params.model.context_length
    shape = params.model
    model = network(vocab_size, context, shape.n_layer, shape.n_head, shape.n_embd)
    rates, weight_decay = scaled_hyperparameters(params, model, setting, vocab_size)
    batches = batches_of(params, inputs, setting.batch_size, seed)
    loss_of = torch.compile(model, dynamic=False)
    warm_up(model, loss_of, batches)
    optimizer = new_optimizer(model, weight_decay=weight_decay, **rates)
    started, step, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        set_schedule(optimizer, step, elapsed / seconds, weight_decay)
        accumulate_gradients(loss_of, *batches.at(step))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        elapsed = time.perf_counter() - started
    return Result(step, elapsed, bits_per_byte(model, inputs.val, context))


def network(vocab_size: int, context: int, n_layer: int, n_head: int, n_embd: int, *, on: str = "cpu") -> Any:
    """nanochat's GPT as base_train builds it, with full attention (`--window-pattern L`)."""
    from nanochat.gpt import GPT as NanochatGPT
    from nanochat.gpt import GPTConfig

    config = GPTConfig(context, vocab_size, n_layer, n_head, n_head, n_embd, window_pattern="L")
    with torch.device("meta"):
        model = NanochatGPT(config)
    if on != "meta":
        model.to_empty(device=on)
        model.init_weights()
    return model


def scaled_hyperparameters(
    params: Params, model: Any, setting: Setting, vocab_size: int
) -> tuple[dict[str, float], float]:
    """Learning rates by their name in `setup_optimizer`, and the weight decay, by base_train's rules.

    Rates grow with the root of the batch size. Weight decay also falls as the horizon grows, which is
    proportional to the number of parameters in matrices and output layer. The reference is a network of
    REFERENCE_DEPTH layers with the same ratio of width to depth and the same width of a head.
    """
    shape = params.model
    width = shape.n_embd * REFERENCE_DEPTH // shape.n_layer
    n_head = shape.n_head * REFERENCE_DEPTH // shape.n_layer
    reference = network(vocab_size, shape.context_length, REFERENCE_DEPTH, n_head, width, on="meta")
    growth = math.sqrt(setting.batch_size * shape.context_length / REFERENCE_BATCH)
    rates = {name: setting.lr_scale * growth * rate for name, rate in LEARNING_RATES.items()}
    return rates, WEIGHT_DECAY * growth * n_scaling(reference) / n_scaling(model)


def n_scaling(model: Any) -> int:
    """The number of parameters that base_train's rules count."""
    counts: dict[str, int] = model.num_scaling_params()
    return counts["transformer_matrices"] + counts["lm_head"]


def warm_up(model: Any, loss_of: Any, batches: Batches) -> None:
    """Make torch compile the network and the optimizer, and leave the weights as they were."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accumulate_gradients(loss_of, *batches.at(0))
    new_optimizer(model).step()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(weights)


def new_optimizer(model: Any, **hyperparameters: float) -> torch.optim.Optimizer:
    """nanochat's, without the line that it prints."""
    with redirect_stdout(io.StringIO()):
        optimizer: torch.optim.Optimizer = model.setup_optimizer(**hyperparameters)
    return optimizer


def set_schedule(optimizer: torch.optim.Optimizer, step: int, progress: float, weight_decay: float) -> None:
    """base_train's learning rates, Muon momentum and weight decay; `progress` is the share of the time."""
    remaining = (1 - progress) / WARMDOWN_FRACTION  # of the warm-down, from 1 to 0
    multiple = min(1.0, remaining + (1 - remaining) * FINAL_LR_FRACTION)
    if step < WARMUP_STEPS:
        multiple = (step + 1) / WARMUP_STEPS
    momentum = 0.97 if remaining >= 1 else 0.97 * remaining + 0.90 * (1 - remaining)
    if step < 400:
        momentum = 0.85 + (0.97 - 0.85) * step / 400
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiple
        if group["kind"] == "muon":
            group["momentum"] = momentum
            group["weight_decay"] = weight_decay * 0.5 * (1 + math.cos(math.pi * progress))


def accumulate_gradients(loss_of: Any, tokens: Tensor, targets: Tensor) -> None:
    """Add the gradient of the mean loss over (B, T) tokens, in micro-batches."""
    n_passes = len(tokens) // MICRO_BATCH_SIZE
    for x, y in zip(tokens.chunk(n_passes), targets.chunk(n_passes), strict=True):
        (loss_of(x, y) / n_passes).backward()


@torch.no_grad()
def bits_per_byte(model: Any, stream: Stream, context: int) -> float:
    """Over every token but the first, in consecutive windows of the context length; the last may be shorter."""
    tokens = torch.from_numpy(stream.tokens.astype(np.int64))
    nats = 0.0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        if len(window) > 2:  # its network needs two tokens or more
            nats += float(model(window[None, :-1], window[None, 1:], loss_reduction="sum"))
    return nats / math.log(2) / stream.n_bytes


if __name__ == "__main__":
    main()

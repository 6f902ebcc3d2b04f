"""Tokens per second of a training step beside `transformers` and a plain loop, at equal architecture and shape.

    python -m benchmarks.training_speed [--compile] [--rounds 5] [--only SHAPE]

A step is forward, backward, gradient clipping and AdamW's update, on random tokens. The plain loop is a GPT-2
in the style of nanoGPT with torch's fused AdamW. All contenders of a shape take turns in one process, so that
other load affects all of them; the result of each is its fastest turn. The share is model FLOPs relative to the
fastest rate of large float32 matrix products, measured between the turns.

On a GPU: `python -m benchmarks.gpu`.
"""

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from gptpipe.model.device import autocast, keep_freed_memory
from gptpipe.model.gpt import GPT
from gptpipe.model.params import ModelParams
from gptpipe.params import load_params
from gptpipe.train import runtime
from gptpipe.train.batches import Batches
from gptpipe.train.optim import build_optimizers
from gptpipe.train.state import TrainState
from gptpipe.train.step import Plan, optimizer_step

# name: layers, heads, width, context, batch, vocabulary
SHAPES = {
    "0.8M": (4, 4, 128, 64, 12, 256),
    "4 x 256, vocabulary 4,096": (4, 4, 256, 256, 8, 4096),
    "4 x 256, vocabulary 50,257": (4, 4, 256, 256, 8, 50257),
    "30M": (6, 6, 384, 256, 8, 50257),
}

HEAD = (
    "| shape | contender | tokens/s | of theirs, ours makes | share of matrix products |\n|---|---|---|---|---|"
)
Step = Callable[[Tensor, Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also ours compiled")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--only", choices=list(SHAPES), help="one shape")
    options = parser.parse_args()
    print(machine.describe() + "\n")
    print(HEAD)
    for name, shape in SHAPES.items():
        if options.only in (None, name):
            compare(name, shape, torch.device("cpu"), options.rounds, also_compiled=options.compile)


def compare(
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    rounds: int,
    *,
    also_compiled: bool = False,
    peak: float = 0,
) -> dict[str, float]:
    """Run all contenders of one shape in turns; prints a row for each, and returns their tokens per second.

    On a GPU everything is in bfloat16 and compiled, and the share is relative to `peak` FLOP/s.
    """
    keep_freed_memory()  # for all contenders alike
    n_layer, n_head, width, context, batch_size, vocab_size = shape
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": width, "context_length": context}
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    compiles = device.type == "cuda"
    gpt2 = ours(sizes, "gpt2", vocab_size)
    flops = gpt2.flops_per_token()
    contenders: dict[str, Step] = {
        "gpt2: gptpipe": stepper(gpt2, gpt2.loss, device, precision, compiles),
        "gpt2: transformers": peer(transformers_gpt2(sizes, vocab_size), device, precision, compiles),
        "gpt2: plain loop": peer(PlainGPT(sizes, vocab_size), device, precision, compiles),
    }
    llama = ours(sizes, "llama", vocab_size)
    contenders |= {
        "llama: gptpipe": stepper(llama, llama.loss, device, precision, compiles),
        "llama: transformers": peer(transformers_llama(sizes, vocab_size), device, precision, compiles),
    }
    if also_compiled:
        for architecture in ("gpt2", "llama"):
            model = ours(sizes, architecture, vocab_size)
            contenders[f"{architecture}: gptpipe, compiled"] = stepper(
                model, model.loss, device, precision, True
            )
    tokens, targets = torch.randint(vocab_size, (2, batch_size, context), device=device)
    for step in contenders.values():  # warm-up, and compilation
        step(tokens, targets)
        step(tokens, targets)
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    rates = []
    for _ in range(rounds):
        for contender, step in contenders.items():
            seconds[contender].append(time_of(step, tokens, targets, device))
        rates.append(peak or machine.matrix_product_rate())
    fastest = {contender: min(turns) for contender, turns in seconds.items()}
    for contender, turn in fastest.items():
        baseline = f"{contender.split(':')[0]}: gptpipe"
        of_theirs = "" if contender == baseline else f"{turn / fastest[baseline]:.2f}"
        share = flops * tokens.numel() / turn / max(rates)
        of_peak = f"{share:.0%}" if contender.startswith("gpt2") else ""
        print(f"| {name} | {contender} | {tokens.numel() / turn:,.0f} | {of_theirs} | {of_peak} |", flush=True)
    contenders.clear()
    gc.collect()
    return {contender: tokens.numel() / turn for contender, turn in fastest.items()}


def time_of(step: Step, tokens: Tensor, targets: Tensor, device: torch.device) -> float:
    """Seconds of the faster of two steps."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        step(tokens, targets)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def ours(sizes: dict[str, int], architecture: str, vocab_size: int) -> GPT:
    is_gpt2 = architecture == "gpt2"
    inner = 4 * sizes["n_embd"] if is_gpt2 else inner_width(sizes["n_embd"])
    extra: dict[str, Any] = {"architecture": architecture, "n_kv_head": sizes["n_head"], "n_inner": inner}
    shared = load_params().model.model_dump()
    return GPT(ModelParams(**{**shared, **sizes, **extra, "tie_embeddings": is_gpt2}), vocab_size)


def inner_width(width: int) -> int:
    """Llama's: 8/3 of the width, rounded to a multiple of 32."""
    return -(-8 * width // 96) * 32


class SameBatch(Batches):
    """Replaces the training windows: the same batch at every step."""

    def __init__(self, tokens: Tensor, targets: Tensor) -> None:
        self._batch = tokens, targets

    def at(self, step: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        return self._batch


def stepper(
    model: GPT, loss: Callable[..., Tensor], device: torch.device, precision: torch.dtype, compiles: bool
) -> Step:
    """A step of gptpipe's training loop."""
    model.to(device).train()
    params = load_params().train.model_copy(update={"optimizer": "adamw", "lr": 1e-4, "warmup_steps": 0})
    compiled = torch.compile(loss, dynamic=False) if compiles else loss
    state = TrainState(model, build_optimizers(model, params), 0)
    plan = Plan(params, 10**6, 0, precision, compiled)

    def step(tokens: Tensor, targets: Tensor) -> None:
        runtime.be_deterministic()  # as every training of ours is, and the others need not be
        state.micro_batch_size = len(tokens)
        optimizer_step(state, SameBatch(tokens, targets), plan)
        torch.use_deterministic_algorithms(False)

    return step


def peer(model: nn.Module, device: torch.device, precision: torch.dtype, compiles: bool) -> Step:
    """A step of a plain loop."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model, dynamic=False) if compiles else model

    def step(tokens: Tensor, targets: Tensor) -> None:
        with autocast(device, precision):
            logits = forward(tokens)
            logits = getattr(logits, "logits", logits)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_gpt2(sizes: dict[str, int], vocab_size: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=sizes["context_length"],
        n_layer=sizes["n_layer"],
        n_head=sizes["n_head"],
        n_embd=sizes["n_embd"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def transformers_llama(sizes: dict[str, int], vocab_size: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=sizes["context_length"],
        num_hidden_layers=sizes["n_layer"],
        num_attention_heads=sizes["n_head"],
        hidden_size=sizes["n_embd"],
        intermediate_size=inner_width(sizes["n_embd"]),
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


class PlainBlock(nn.Module):
    """GPT-2's block, with one product for queries, keys and values."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        mixed: Tensor = self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + mixed


class PlainGPT(nn.Module):
    """A GPT-2 as one writes it in an afternoon."""

    def __init__(self, sizes: dict[str, int], vocab_size: int) -> None:
        super().__init__()
        width = sizes["n_embd"]
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(sizes["context_length"], width)
        self.blocks = nn.Sequential(*(PlainBlock(width, sizes["n_head"]) for _ in range(sizes["n_layer"])))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


if __name__ == "__main__":
    main()

"""Tokens per second of generation, beside `transformers.generate` with the same weights in the same run.

Greedy, so that both do the same work: the texts are compared. The contenders take turns. The first ratio
is that of their fastest turns, the second that of each turn and the next one; it is the better one beside other
programs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from gptpipe.model.generate import Sampling, generate
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import load_model, save_model
from gptpipe.model.params import ModelParams
from gptpipe.params import load_params

_PROMPT, _NEW = 32, 128  # tokens
_SMALL = {"vocab_size": 4_096}  # and the shape of the default run
_LARGER = {"vocab_size": 16_384, "n_layer": 12, "n_head": 6, "n_kv_head": 6, "n_embd": 384, "n_inner": 1_024}
_NETWORKS: dict[str, dict[str, Any]] = {
    "qwen3": {"architecture": "qwen3", **_SMALL},
    "llama": {"architecture": "llama", **_SMALL},
    "gpt2": {"architecture": "gpt2", **_SMALL},
    "qwen3-larger": {"architecture": "qwen3", **_LARGER},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=_NETWORKS, help="one of the networks")
    options = parser.parse_args()
    print(machine.describe())
    print(
        "| network | prompts | gptpipe, tokens/s | transformers, tokens/s | fastest turns | median of turns |"
    )
    print("|---|---|---|---|---|---|")
    for name in [options.only] if options.only else _NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            save_untrained(Path(folder), _NETWORKS[name])
            compare(name, Path(folder), options.rounds)


def save_untrained(folder: Path, network: dict[str, Any]) -> None:
    """A network with random weights. Without training, a head that is not tied is zero: draw it too."""
    shape = {**network}
    vocab_size = shape.pop("vocab_size")
    is_tied = shape["architecture"] == "gpt2"  # which allows nothing else
    values = {**load_params().model.model_dump(), **shape, "tie_embeddings": is_tied}
    params = ModelParams(**{**values, "n_kv_head": values["n_head"]})
    torch.manual_seed(0)
    model = GPT(params, vocab_size)
    if not is_tied:
        torch.nn.init.normal_(model.head.weight, std=0.02)
    save_model(folder, params, vocab_size, vocab_size - 1, dict(model.named_parameters()))


def compare(name: str, folder: Path, rounds: int) -> None:
    """Print a row for 1 prompt and one for 16."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = load_model(folder).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    for n_prompts in (1, 16):
        generator = torch.Generator().manual_seed(n_prompts)
        prompts = torch.randint(model.vocab_size - 1, (n_prompts, _PROMPT), generator=generator)

        def our_turn(prompts: torch.Tensor = prompts) -> list[list[int]]:
            steps = list(generate(model, prompts.tolist(), _NEW, Sampling(temperature=0)))
            rows: list[list[int]] = torch.tensor(steps).T.tolist()
            return rows

        def their_turn(prompts: torch.Tensor = prompts) -> list[list[int]]:
            mask = torch.ones_like(prompts)
            tokens = theirs.generate(
                prompts, attention_mask=mask, max_new_tokens=_NEW, do_sample=False, pad_token_id=0
            )
            rows: list[list[int]] = tokens[:, _PROMPT:].tolist()
            return rows

        assert our_turn() == their_turn()  # also a warm-up
        times = [(seconds(our_turn), seconds(their_turn)) for _ in range(rounds)]
        ours, others = (min(column) for column in zip(*times, strict=True))
        ratios = [their / our for our, their in times]
        n_tokens, median = n_prompts * _NEW, statistics.median(ratios)
        print(
            f"| {name} | {n_prompts} | {n_tokens / ours:,.0f} | {n_tokens / others:,.0f} "
            f"| {others / ours:.2f} | {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
            flush=True,
        )


def seconds(turn: Callable[[], object]) -> float:
    started = time.perf_counter()
    turn()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

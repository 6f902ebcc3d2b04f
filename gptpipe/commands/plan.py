"""What a training will take, before it is started: size, data, memory, and time by a short probe on this machine."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gptpipe.formats.streams import Stream
from gptpipe.model.gpt import GPT
from gptpipe.params import Params
from gptpipe.score.scoring import score
from gptpipe.train.batches import Batches
from gptpipe.train.inputs import load_inputs
from gptpipe.train.memory import estimated_bytes, fitting_micro_batch_size, free_bytes
from gptpipe.train.optim import build_optimizers
from gptpipe.train.runtime import loss_function
from gptpipe.train.state import TrainState
from gptpipe.train.step import Plan, optimizer_step

_WARM_UP, _PROBED = 2, 5  # steps
_COMPUTE_OPTIMAL = 20  # tokens per parameter (Hoffmann et al., 2022, arXiv:2203.15556, table 3)
_REPEATS = 4  # passes that teach nearly as much as new text would (Muennighoff et al., 2023, arXiv:2305.16264)


@dataclass(frozen=True)
class Forecast:
    """Lines to read, and what looks lopsided."""

    lines: dict[str, str]
    warnings: list[str]


def forecast(params: Params, split: Path) -> Forecast:
    """Look at the split in `split` and take a few steps of the training that params.yaml describes; writes nothing.

    By one process, whatever `train.launcher` says. Raises IntegrityError, InputError for too few tokens, ConfigError
    for a device that is not there, ResourceError for too little memory.
    """
    section = params.train
    inputs = load_inputs(params, split)
    runtime, train, val, n_steps = inputs.runtime, inputs.train, inputs.val, inputs.n_steps
    torch.manual_seed(params.seed)
    model = GPT(params.model, inputs.tokenizer.vocab_size).to(runtime.device)
    model.activation_checkpointing = section.activation_checkpointing
    free, holds_all_logits = free_bytes(runtime.device), runtime.holds_all_logits
    micro_batch_size = fitting_micro_batch_size(section, model, free, holds_all_logits=holds_all_logits)
    loss = loss_function(model, section, inputs.tokenizer.end_of_text, is_compiled=runtime.is_compiled)
    state = TrainState(model, build_optimizers(model, section), micro_batch_size)
    plan = Plan(section, n_steps, params.seed, runtime.precision, loss)
    first_seconds, step_seconds = _step_seconds(state, inputs.batches, plan)
    validation_seconds = _validation_seconds(model, val, runtime.precision)
    n_validations = 1 + -(-n_steps // section.eval_every)
    seconds = first_seconds + n_steps * step_seconds + n_validations * validation_seconds
    tokens = n_steps * section.batch_size * params.model.context_length
    passes = tokens / len(train.tokens)
    flops = tokens * model.flops_per_token()
    needed = estimated_bytes(model, micro_batch_size, holds_all_logits=holds_all_logits)
    processes = "" if section.launcher == "python" else f" by one process, not as `{section.launcher}` has it"
    compilation = f", {first_seconds:.0f} s to compile" if runtime.is_compiled else ""
    lines = {
        "parameters": f"{model.n_parameters():,}, {model.n_multiplied():,} of them multiplied with every token",
        "text": f"{len(train.tokens):,} train tokens, {train.n_bytes / max(1, len(train.tokens)):.2f} bytes each; "
        f"{len(val.tokens):,} validation tokens in {len(val.documents):,} documents",
        "training": f"{n_steps:,} steps of {section.batch_size} x {params.model.context_length} tokens: {tokens:,} "
        f"tokens, {passes:.1f} passes over the text",
        "tokens per parameter": f"{tokens / model.n_parameters():.1f} (compute-optimal: about {_COMPUTE_OPTIMAL})",
        "compute": f"{flops:.3g} FLOPs, {flops / n_steps / step_seconds / 1e9:,.0f} GFLOP/s here",
        "memory": f"about {needed / 2**30:.2f} GiB of {free / 2**30:.1f} GiB free, micro-batches of {micro_batch_size}",
        "time": f"about {_duration(seconds)} on {runtime.device}{processes}: {step_seconds * 1e3:,.0f} ms a step, "
        f"{n_validations} validations of {validation_seconds:.1f} s{compilation}",
    }
    return Forecast(lines, _lopsided(params, train, val, tokens / model.n_multiplied(), passes))


def _step_seconds(state: TrainState, batches: Batches, plan: Plan) -> tuple[float, float]:
    """What the first steps take beyond the others, and a step."""
    state.model.train()
    times = []
    for _ in range(_WARM_UP + _PROBED):
        started = time.perf_counter()
        optimizer_step(state, batches, plan)
        times.append(time.perf_counter() - started)
    usual = statistics.median(times[_WARM_UP:])
    return max(0.0, sum(times[:_WARM_UP]) - _WARM_UP * usual), usual


def _validation_seconds(model: GPT, stream: Stream, precision: torch.dtype) -> float:
    """By the first windows of the stream, at most 32."""
    n = min(len(stream.tokens), 32 * model.params.context_length + 1)
    if n < 2:
        return 0.0
    part = Stream(stream.tokens[:n], stream.documents)
    started = time.perf_counter()
    score(model, part, precision=precision)
    return (time.perf_counter() - started) * len(stream.tokens) / n


def _lopsided(params: Params, train: Stream, val: Stream, tokens_per_parameter: float, passes: float) -> list[str]:
    """What a person who knows would ask about, each with what to change."""
    context = params.model.context_length
    mean_length = len(train.tokens) / max(1, len(train.documents))
    checks = {
        f"{tokens_per_parameter:.2f} tokens per multiplied parameter: too few to train so large a model; raise "
        "train.max_steps or lower model.n_embd": tokens_per_parameter < 1,
        f"{tokens_per_parameter:.0f} tokens per multiplied parameter: a larger model would learn more from the same "
        "compute; raise model.n_embd or model.n_layer": tokens_per_parameter > 20 * _COMPUTE_OPTIMAL,
        f"{passes:.1f} passes over the text: beyond about {_REPEATS} they teach little; add text, lower "
        "train.max_steps, or set model.dropout to 0.1": passes > 2 * _REPEATS,
        f"model.context_length {context} is {context / mean_length:.0f} times a document's mean length of "
        f"{mean_length:.0f} tokens: a shorter context is faster, train.document_masking keeps strangers "
        "apart": context > 8 * mean_length,
        f"validation has {len(val.documents):,} documents and {len(val.tokens):,} tokens: its loss will say little; "
        "raise split.val_fraction": len(val.documents) < 50 and len(val.tokens) < 20_000,
    }
    return [words for words, is_so in checks.items() if is_so]


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"

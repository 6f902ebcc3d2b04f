"""Short measurements of a training on this machine: the seconds that it takes, and its first losses."""

import math
import statistics
import time
from dataclasses import dataclass, replace

import torch

from gptpipe.formats.streams import Stream
from gptpipe.model.gpt import GPT
from gptpipe.params import Params
from gptpipe.score.scoring import Scoring, score
from gptpipe.train.batches import Batches
from gptpipe.train.inputs import Inputs
from gptpipe.train.memory import estimated_bytes, fitting_micro_batch_size, free_bytes
from gptpipe.train.optim import build_optimizers
from gptpipe.train.runtime import loss_function
from gptpipe.train.state import TrainState
from gptpipe.train.step import Plan, optimizer_step

_N_WARM_UP_STEPS = 2
_N_MEASURED_WINDOWS = 32  # of validation, for its time
_N_SCORED_WINDOWS = 256  # of validation, for its loss


@dataclass(frozen=True)
class Timing:
    """Measured times in seconds."""

    warm_up: float  # by which the first steps take longer, for example to compile
    step: float
    validation: float

    def total(self, n_steps: int, n_validations: int) -> float:
        """Seconds of a training."""
        return self.warm_up + n_steps * self.step + n_validations * self.validation


@dataclass(frozen=True)
class Memory:
    """Memory in bytes: what a training needs, by an estimate, and what is free."""

    needed: int
    free: int


@dataclass(frozen=True)
class Probe:
    """A training before its first step."""

    state: TrainState
    batches: Batches
    plan: Plan
    memory: Memory


def new_probe(params: Params, inputs: Inputs, n_steps: int) -> Probe:
    """A training of `n_steps` steps on the tokens of `inputs`, with the network and the batches of `params`.

    Raises ResourceError for too little memory.
    """
    section, runtime = params.train, inputs.runtime
    torch.manual_seed(params.seed)
    model = GPT(params.model, inputs.tokenizer.vocab_size).to(runtime.device)
    model.activation_checkpointing = section.activation_checkpointing
    free, holds_all_logits = free_bytes(runtime.device), runtime.holds_all_logits
    micro_batch_size = fitting_micro_batch_size(section, model, free, holds_all_logits=holds_all_logits)
    needed = estimated_bytes(model, micro_batch_size, holds_all_logits=holds_all_logits)
    batches = Batches(
        inputs.train.tokens,
        context_length=params.model.context_length,
        stride=section.stride,
        batch_size=section.batch_size,
        seed=params.seed,
    )
    loss = loss_function(model, section, inputs.tokenizer.end_of_text, is_compiled=runtime.is_compiled)
    state = TrainState(model, build_optimizers(model, section), micro_batch_size)
    return Probe(
        state, batches, Plan(section, n_steps, params.seed, runtime.precision, loss), Memory(needed, free)
    )


def measure(probe: Probe, inputs: Inputs, n_measured_steps: int) -> Timing:
    """Take a few steps, and score a part of the validation split."""
    probe.state.model.train()
    times = []
    for _ in range(_N_WARM_UP_STEPS + n_measured_steps):
        started = time.perf_counter()
        optimizer_step(probe.state, probe.batches, probe.plan)
        times.append(time.perf_counter() - started)
    step = statistics.median(times[_N_WARM_UP_STEPS:])
    warm_up = sum(times[:_N_WARM_UP_STEPS]) - _N_WARM_UP_STEPS * step
    validation = _measure_validation(probe.state.model, inputs.val, inputs.scoring)
    return Timing(max(0.0, warm_up), step, validation)


def _measure_validation(model: GPT, stream: Stream, scoring: Scoring) -> float:
    """Seconds of a validation, estimated from the first windows of the stream."""
    beginning = _first_windows(stream, _N_MEASURED_WINDOWS, model)
    started = time.perf_counter()
    score(model, beginning, scoring)
    return (time.perf_counter() - started) * len(stream.tokens) / len(beginning.tokens)


def bits_per_byte_after(probe: Probe, inputs: Inputs) -> float:
    """Make all steps of a short training; returns its bits per byte on the first windows of validation.

    A token counts as many bytes as the mean token of the validation split. Raises NumericError.
    """
    probe.state.model.train()
    while probe.state.step < probe.plan.n_steps:
        optimizer_step(probe.state, probe.batches, probe.plan)
    beginning = _first_windows(inputs.val, _N_SCORED_WINDOWS, probe.state.model)
    nats, _, n_tokens = score(probe.state.model, beginning, inputs.scoring).by_document.sum(1)
    bytes_per_token = inputs.val.n_bytes / len(inputs.val.tokens)
    return float(nats / n_tokens / math.log(2) / bytes_per_token)


def _first_windows(stream: Stream, n_windows: int, model: GPT) -> Stream:
    n = min(len(stream.tokens), n_windows * model.params.context_length + 1)
    return replace(stream, tokens=stream.tokens[:n])

"""`gptpipe plan --minutes`: the network and the training that learn most about this text in a given time.

A few steps of networks of several sizes measure how many steps each can make on this machine. The law in
`loss_law.py` says which of these trainings ends with the lowest loss. A short training of that network measures
how difficult the text is, which turns the law's ratios into bits per byte.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gptpipe.commands.choice import (
    MIN_STEPS,
    SHAPES,
    Budget,
    Candidate,
    Choice,
    Shape,
    as_options,
    changed,
    changes_for,
    choices,
    proposed_batch_size,
)
from gptpipe.commands.plan import Estimate, describe, text_warnings
from gptpipe.commands.probes import bits_per_byte_after, measure, new_probe
from gptpipe.params import Params
from gptpipe.shell.errors import ConfigError, InputError, ResourceError
from gptpipe.train.inputs import Inputs, load_inputs

_N_MEASURED_STEPS = 3
_SHORT_SHARE, _MIN_SHORT_STEPS = 0.05, 40  # steps of the short training, of those of the whole
_PREDICTION_ERROR = 0.06  # relative; docs/parameters.md has the errors that were measured


@dataclass(frozen=True)
class Proposal:
    """What the command prints: the estimate of the proposed training, and the options that ask for it."""

    estimate: Estimate
    options: str  # of `dvc exp run`


def propose_training(params: Params, split: Path, minutes: float) -> Proposal:
    """Measure networks of several sizes on the split in `split`, and choose one; writes nothing.

    `minutes` is the time of the compiler, the steps and the validations. Raises ConfigError for a time in which
    no network can be trained, InputError for too little text, and the errors of `estimate_training`.
    """
    _check(params, minutes)
    params = changed(params, {"train.spike_sigmas": None})  # the probes are too short to recognise spikes
    inputs = load_inputs(params, split)
    eager = replace(inputs, runtime=replace(inputs.runtime, is_compiled=False))
    budget = _budget(params, eager, 60 * minutes)
    tried = list(choices(_candidates(params, eager, budget), budget))
    if not tried:
        raise ConfigError(
            f"--minutes {minutes:g}: too short to make {MIN_STEPS} steps with the smallest network "
            "and to validate it; give more time"
        )
    best = min(tried, key=lambda choice: choice.loss)
    return _proposal(params, split, budget, best, tried)


def _check(params: Params, minutes: float) -> None:
    """Raises ConfigError."""
    if not (math.isfinite(minutes) and minutes > 0):
        raise ConfigError(f"--minutes {minutes:g}: give a number above 0")
    for key in ("init_from", "continue_from"):
        if getattr(params.train, key) is not None:
            raise ConfigError(
                f"--minutes: train.{key} already decides the network's shape; set it to null, "
                "or run `gptpipe plan` without --minutes"
            )


def _budget(params: Params, inputs: Inputs, seconds: float) -> Budget:
    """The budget, with a batch size for the tokens that the smallest network sees in that time.

    Raises InputError if that is too little text, and ResourceError.
    """
    n_train_tokens, context = len(inputs.train.tokens), params.model.context_length
    budget = Budget(seconds, n_train_tokens, params.train.batch_size * context)
    smallest = _candidate(params, inputs, budget, SHAPES[0])
    n_tokens = budget.n_steps(smallest) * budget.tokens_per_step
    budget = replace(budget, tokens_per_step=proposed_batch_size(n_tokens, context) * context)
    if replace(budget, seconds=math.inf).n_steps(smallest) < MIN_STEPS:
        raise InputError(
            f"the train split has {n_train_tokens:,} tokens, too few for any proposal: the smallest network "
            f"learns them by heart within {MIN_STEPS} steps; add text, or lower model.context_length"
        )
    return budget


def _candidates(params: Params, inputs: Inputs, budget: Budget) -> Iterator[Candidate]:
    """Measure networks from small to large, until one does not fit into memory."""
    for shape in SHAPES:
        try:
            yield _candidate(params, inputs, budget, shape)
        except ResourceError:
            return


def _candidate(params: Params, inputs: Inputs, budget: Budget, shape: Shape) -> Candidate:
    n_steps = 1000  # any number: the learning rate does not matter for the time
    probe = new_probe(changed(params, changes_for(params, shape, budget, n_steps)), inputs, n_steps)
    timing = measure(probe, inputs, _N_MEASURED_STEPS)
    return Candidate(shape, probe.state.model.n_multiplied(), timing)


def _proposal(params: Params, split: Path, budget: Budget, best: Choice, tried: list[Choice]) -> Proposal:
    """The proposal for the best choice. Measures it again: the compiler is used for long trainings only."""
    chosen, n_steps = best.candidate, best.n_steps
    proposed = changed(params, changes_for(params, chosen.shape, budget, n_steps))
    inputs = load_inputs(proposed, split)
    probe = new_probe(proposed, inputs, n_steps)
    timing = measure(probe, inputs, _N_MEASURED_STEPS)
    n_steps = max(MIN_STEPS, budget.n_steps(replace(chosen, timing=timing)))
    changes = changes_for(params, chosen.shape, budget, n_steps)
    proposed = changed(params, changes)
    probe = replace(probe, plan=replace(probe.plan, n_steps=n_steps))
    bits = _predicted_bits(proposed, inputs, budget, chosen, n_steps)
    lines = {
        str(choice.candidate.shape): _describe(choice, bits * choice.loss / best.loss, budget)
        for choice in tried
    }
    lines |= describe(proposed, inputs, probe, timing).lines
    lines["bits per byte"] = (
        f"about {bits:.2f}, from {bits / (1 + _PREDICTION_ERROR):.2f} to {bits * (1 + _PREDICTION_ERROR):.2f}, "
        "on the validation documents"
    )
    # Not those about proportions: the law has weighed them.
    warnings = list(text_warnings(proposed, inputs.train, inputs.val))
    return Proposal(Estimate(lines, warnings), as_options(changes))


def _describe(choice: Choice, bits: float, budget: Budget) -> str:
    return (
        f"{choice.n_steps:,} steps of {choice.candidate.timing.step * 1e3:,.0f} ms, "
        f"{budget.n_passes(choice.n_steps):.1f} passes: about {bits:.2f} bits per byte"
    )


def _predicted_bits(
    params: Params, inputs: Inputs, budget: Budget, candidate: Candidate, n_steps: int
) -> float:
    """Bits per byte on the validation documents after a training of `n_steps` steps.

    A short training of the same network measures them after fewer steps. The law says by how much they fall.
    """
    n_short = min(n_steps, max(_MIN_SHORT_STEPS, int(_SHORT_SHARE * n_steps)))
    short = changed(params, {"train.max_steps": n_short, "train.warmup_steps": n_short // 10})
    eager = replace(inputs, runtime=replace(inputs.runtime, is_compiled=False))
    bits = bits_per_byte_after(new_probe(short, eager, n_short), eager)
    return bits * budget.loss(candidate, n_steps) / budget.loss(candidate, n_short)

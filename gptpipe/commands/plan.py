"""`gptpipe plan`: what a training will take. Its time is measured in a few steps on this machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gptpipe.commands.probes import Probe, Timing, measure, new_probe
from gptpipe.formats.streams import Stream
from gptpipe.params import Params
from gptpipe.train.inputs import Inputs, load_inputs

_N_MEASURED_STEPS = 5
_COMPUTE_OPTIMAL = 20  # tokens per parameter (Hoffmann et al., 2022, arXiv:2203.15556, table 3)
# More passes over the same text teach less than new text (Muennighoff et al., 2023, arXiv:2305.16264).
_USEFUL_PASSES = 4


@dataclass(frozen=True)
class Estimate:
    """Lines to print, by name, and warnings about unusual proportions."""

    lines: dict[str, str]
    warnings: list[str]


def estimate_training(params: Params, split: Path) -> Estimate:
    """Take a few steps of the training that params.yaml describes on the split in `split`; writes nothing.

    One process takes them, whatever `train.launcher` says. Raises IntegrityError, InputError for too few
    tokens, ConfigError for a device that is not available, ResourceError for too little memory.
    """
    inputs = load_inputs(params, split)
    probe = new_probe(params, inputs, inputs.n_steps)
    return describe(params, inputs, probe, measure(probe, inputs, _N_MEASURED_STEPS))


def describe(params: Params, inputs: Inputs, probe: Probe, timing: Timing) -> Estimate:
    """The estimate for a training that was measured as `probe`."""
    section, device, n_steps = params.train, inputs.runtime.device, probe.plan.n_steps
    model, memory = probe.state.model, probe.memory
    n_tokens = n_steps * section.batch_size * params.model.context_length
    n_passes = n_tokens / len(inputs.train.tokens)
    flops = n_tokens * model.flops_per_token()
    lines = {
        "parameters": f"{model.n_parameters():,}, {model.n_multiplied():,} of them multiplied with every token",
        "text": _describe_text(inputs.train, inputs.val),
        "training": f"{n_steps:,} steps of {section.batch_size} x {params.model.context_length} tokens: "
        f"{n_tokens:,} tokens, {n_passes:.1f} passes over the text",
        "tokens per parameter": f"{n_tokens / model.n_parameters():.1f} "
        f"(compute-optimal: about {_COMPUTE_OPTIMAL})",
        "compute": f"{flops:.3g} FLOPs, {flops / n_steps / timing.step / 1e9:,.0f} GFLOP/s here",
        "memory": f"about {memory.needed / 2**30:.2f} GiB of {memory.free / 2**30:.1f} GiB free, "
        f"micro-batches of {probe.state.micro_batch_size}",
        "time": _describe_time(params, n_steps, timing, device, is_compiled=inputs.runtime.is_compiled),
    }
    tokens_per_parameter = n_tokens / model.n_multiplied()
    warnings = [
        *_proportion_warnings(tokens_per_parameter, n_passes),
        *text_warnings(params, inputs.train, inputs.val),
    ]
    return Estimate(lines, warnings)


def _describe_text(train: Stream, val: Stream) -> str:
    bytes_per_token = train.n_bytes / max(1, len(train.tokens))
    return (
        f"{len(train.tokens):,} train tokens, {bytes_per_token:.2f} bytes each; "
        f"{len(val.tokens):,} validation tokens in {len(val.documents):,} documents"
    )


def _describe_time(
    params: Params, n_steps: int, timing: Timing, device: torch.device, *, is_compiled: bool
) -> str:
    section = params.train
    n_validations = 1 + -(-n_steps // section.eval_every)  # one before the first step
    seconds = timing.total(n_steps, n_validations)
    one_process = "" if section.launcher == "python" else f" with one process, not with `{section.launcher}`"
    compilation = f", {timing.warm_up:.0f} s to compile" if is_compiled else ""
    return (
        f"about {_duration(seconds)} on {device}{one_process}: {timing.step * 1e3:,.0f} ms a step, "
        f"{n_validations} validations of {timing.validation:.1f} s{compilation}"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _proportion_warnings(tokens_per_parameter: float, n_passes: float) -> Iterator[str]:
    """Unusual proportions of model, data and training, each with what to change.

    `tokens_per_parameter` counts the parameters that are multiplied with every token.
    """
    if tokens_per_parameter < 1:
        yield (
            f"{tokens_per_parameter:.2f} tokens per multiplied parameter: too few to train so large a model; "
            "raise train.max_steps or lower model.n_embd"
        )
    if tokens_per_parameter > 20 * _COMPUTE_OPTIMAL:
        yield (
            f"{tokens_per_parameter:.0f} tokens per multiplied parameter: "
            "a larger model would learn more from the same compute; raise model.n_embd or model.n_layer"
        )
    if n_passes > 2 * _USEFUL_PASSES:
        yield (
            f"{n_passes:.1f} passes over the text: after about {_USEFUL_PASSES}, another pass teaches little; "
            "add text, lower train.max_steps, or set model.dropout to 0.1"
        )


def text_warnings(params: Params, train: Stream, val: Stream) -> Iterator[str]:
    """What about the text is unusual for these parameters, each with what to change."""
    context = params.model.context_length
    mean_length = len(train.tokens) / max(1, len(train.documents))
    if context > 8 * mean_length:
        yield (
            f"model.context_length {context} is {context / mean_length:.0f} times the mean document length "
            f"of {mean_length:.0f} tokens; lower it to train faster, or set train.document_masking to true, "
            "so that documents in one window do not see each other"
        )
    if len(val.documents) < 50 and len(val.tokens) < 20_000:
        yield (
            f"validation has {len(val.documents):,} documents and {len(val.tokens):,} tokens: "
            "its loss will be a rough estimate; raise split.val_fraction"
        )

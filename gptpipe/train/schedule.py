"""The learning rate as a pure function of the step."""

import math

from gptpipe.train.params import TrainParams


def learning_rate(step: int, n_steps: int, params: TrainParams) -> float:
    """Learning rate of a step, counted from 0.

    Linear warm-up to `lr` over `warmup_steps`; then to `lr * final_lr_fraction` at the end: along half a cosine
    (Loshchilov and Hutter, 2017, arXiv:1608.03983), linearly, or (wsd: warm-up, stable, decay; Hu et al., 2024,
    arXiv:2404.06395) constant but for a linear fall over the last `decay_fraction` of the steps. The fall never
    begins before the warm-up ends, so the rate has no jumps.
    """
    if step < params.warmup_steps:
        return params.lr * (step + 1) / params.warmup_steps
    progress = (step - params.warmup_steps) / max(1, n_steps - params.warmup_steps)  # 0 after warm-up, below 1
    match params.schedule:
        case "constant":
            return params.lr
        case "cosine":
            height = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            height = 1 - progress
        case "wsd":
            n_decaying = min(params.decay_fraction * n_steps, n_steps - params.warmup_steps)
            height = min(1.0, (n_steps - step) / n_decaying)
    return params.lr * (params.final_lr_fraction + (1 - params.final_lr_fraction) * height)


def steps_before_the_end_matters(n_steps: int, params: TrainParams) -> int:
    """The number of steps at the start whose learning rates stay the same if the training is made longer.

    They are all steps with a constant schedule, those before the decay with wsd, else those of the warm-up.
    """
    return next(
        (
            step
            for step in range(n_steps)
            if learning_rate(step, n_steps, params) != learning_rate(step, 2 * n_steps, params)
        ),
        n_steps,
    )

"""How much memory a training takes, and how large its micro-batches may be."""

import torch

from gptpipe.model.cpu_kernels import LinearCrossEntropy
from gptpipe.model.device import available_memory, is_sharded
from gptpipe.model.gpt import GPT
from gptpipe.shell.console import complain
from gptpipe.shell.environment import rank_info
from gptpipe.shell.errors import ResourceError
from gptpipe.train.params import TrainParams

SMALLER_BATCHES = "lower train.micro_batch_size or the model, or set train.activation_checkpointing to true"
_USABLE = 0.9  # share of the free memory that an estimate may fill


def estimated_bytes(model: GPT, n_sequences: int, *, holds_all_logits: bool) -> int:
    """An estimate of the memory of training: weights, gradients, optimizer state, activations of `n_sequences`.

    Activations after Korthikanti et al., 2022 (arXiv:2205.05198, section 4.1), with attention that keeps no T x
    T matrix; all in float32.
    """
    params = model.params
    per_block = 2 * params.n_embd if model.activation_checkpointing else 12 * params.n_embd + 5 * params.n_inner
    n_tokens = n_sequences * params.context_length
    n_logit_rows = n_tokens if holds_all_logits else min(n_tokens, LinearCrossEntropy.ROWS)
    n_logits = n_logit_rows * 3 * model.vocab_size
    n_weights = 0
    for parameter in model.parameters():
        part = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
        n_weights += part.numel()
    return 4 * (4 * n_weights + n_tokens * params.n_layer * per_block + n_logits)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device for this process."""
    return available_memory(device) // (1 if device.type == "cuda" else rank_info().n_local_ranks)


def fitting_micro_batch_size(params: TrainParams, model: GPT, n_free: int, *, holds_all_logits: bool) -> int:
    """`train.micro_batch_size`, or the largest divisor of the batch whose estimate fits into `n_free` bytes.

    Raises ResourceError if none fits.
    """
    divisors = [n for n in range(params.batch_size, 0, -1) if params.batch_size % n == 0]
    candidates = divisors if params.micro_batch_size is None else [params.micro_batch_size]
    for candidate in candidates:
        needed = estimated_bytes(model, candidate, holds_all_logits=holds_all_logits)
        if needed < _USABLE * n_free:
            return candidate
    raise ResourceError(
        f"train: micro-batches of {candidates[-1]} need about {needed / 2**30:.1f} GiB, "
        f"{n_free / 2**30:.1f} are free; {SMALLER_BATCHES}"
    )


def halved(micro_batch_size: int, n_sequences: int) -> int:
    """The largest size up to half of it that divides `n_sequences`.

    Raises ResourceError for a single sequence.
    """
    if micro_batch_size == 1:
        raise ResourceError(
            "train: out of memory with single sequences; lower the model's size or model.context_length, "
            "or set train.activation_checkpointing to true"
        )
    size = next(n for n in range(micro_batch_size // 2, 0, -1) if n_sequences % n == 0)
    complain(f"warning: out of memory; continuing with micro-batches of {size}")
    return size

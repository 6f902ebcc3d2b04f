"""Names and shapes of weights: those of our network, and those in Hugging Face layout."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from gptpipe.model.gpt import GPT, qkv_rows
from gptpipe.model.params import ModelParams

# Parts of our parameter names -> the names of the Hugging Face ecosystem. Other parts are equal.
_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_GPT2_NAMES = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "blocks": "transformer.h",
    "attention_norm": "ln_1",
    "attention": "attn",
    "qkv_proj": "c_attn",
    "o_proj": "c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward": "mlp",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}

T = TypeVar("T")


def hf_names(name: str, params: ModelParams) -> list[str]:
    """The names of one of our parameters. Llama and Qwen3 have a matrix each for queries, keys and values."""
    table = _GPT2_NAMES if params.architecture == "gpt2" else _LLAMA_NAMES
    hf_name = ".".join(table.get(part, part) for part in name.split("."))
    if "qkv_proj" in hf_name:
        return [hf_name.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"]
    return [hf_name]


def with_prefix(hf_weights: Mapping[str, T]) -> dict[str, T]:
    """Add the prefix `transformer.` to the names of GPT-2 if it is missing, as in OpenAI's own upload."""
    prefix = "transformer." if "wte.weight" in hf_weights else ""
    return {f"{prefix}{name}": value for name, value in hf_weights.items()}


def to_hf(weights: Mapping[str, Tensor], params: ModelParams) -> dict[str, Tensor]:
    """Our weights under their Hugging Face names and shapes; a tied head is left out."""
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if params.tie_embeddings and name == "head.weight":
            continue
        names = hf_names(name, params)
        parts = torch.split(value, qkv_rows(params)) if len(names) == 3 else [value]
        for hf_name, part in zip(names, parts, strict=True):
            converted[hf_name] = _transposed(name, part, params)
    return converted


def from_hf(hf_weights: Mapping[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """The reverse of `to_hf` for the parameters of `model`; other stored tensors are ignored."""
    converted: dict[str, Tensor] = {}
    for name, _ in model.named_parameters():
        parts = [hf_weights[hf_name] for hf_name in hf_names(name, model.params)]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        converted[name] = _transposed(name, value, model.params)
    return converted


def _transposed(name: str, value: Tensor, params: ModelParams) -> Tensor:
    """GPT-2 stores the matrices of its blocks as (in, out), torch uses (out, in)."""
    return value.mT if params.architecture == "gpt2" and "_proj.weight" in name else value

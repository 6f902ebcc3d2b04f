"""The folder layout that the Hugging Face ecosystem reads: config.json, generation_config.json, model.safetensors."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gptpipe.config import ModelParams
from gptpipe.errors import ConfigError, InputError, IntegrityError
from gptpipe.files import MANIFEST, verify, write_bytes, write_json
from gptpipe.model.gpt import GPT, qkv_widths

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

# Parts of our parameter names -> theirs; the others are alike.
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
_MODEL_CLASS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Our parameters -> keys of config.json.
_LLAMA_KEYS = {
    "context_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "n_inner": "intermediate_size",
    "dropout": "attention_dropout",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_inner": "n_inner",
    "dropout": "resid_pdrop",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
# What their configurations mean by keys that are missing or null.
_LLAMA_DEFAULTS = {"attention_dropout": 0.0, "tie_word_embeddings": False, "rope_theta": 10000.0, "head_dim": None}
_GPT2_DEFAULTS = {"resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

# Switches of their networks that this one does not have, with the position that it computes.
_FIXED = {
    "activation_function": "gelu_new",
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_sliding_window": False,
}


def save_model(
    folder: Path, params: ModelParams, vocab_size: int, end_of_text: int, weights: dict[str, Tensor]
) -> None:
    """Write the network's files into a folder; `weights` are its parameters by name."""
    theirs = {name: value.detach().cpu().contiguous() for name, value in _to_their_names(weights, params).items()}
    write_bytes(folder / WEIGHTS, save(theirs, metadata={"format": "pt"}))
    write_json(folder / CONFIG, to_config(params, vocab_size, end_of_text))
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    write_json(folder / "generation_config.json", {"do_sample": True, **ends})


def load_model(folder: Path) -> GPT:
    """The network that a folder holds, in float32 on the CPU. The caller has verified the folder.

    Raises InputError for a folder that this project cannot read, IntegrityError for weights that do not fit it.
    """
    config = read_config(folder)
    model = GPT(from_config(config, folder), config["vocab_size"])
    load_weights(model, folder)
    return model


def load_weights(model: GPT, folder: Path) -> None:
    """Fill a network with the weights of a folder, whose tensors must fit it.

    Of learned positions the first `context_length` are taken. Raises InputError, IntegrityError.
    """
    try:
        theirs = {key: value for path in weight_files(folder) for key, value in load_file(path).items()}
        ours = _to_our_names(theirs, model)
        if "position_embedding.weight" in ours:
            ours["position_embedding.weight"] = ours["position_embedding.weight"][: model.params.context_length]
        if model.params.tie_embeddings:
            ours["head.weight"] = ours["embedding.weight"]
        model.load_state_dict({name: value.float() for name, value in ours.items()})
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise IntegrityError(f"{folder}: its weights cannot be read into this network: {reason}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that an index names. Raises InputError."""
    index = folder / f"{WEIGHTS}.index.json"
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.exists() else [WEIGHTS]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of safetensors files; fetch the model again") from error
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: not there; weights must be in safetensors files")
    return [folder / name for name in names]


def to_config(params: ModelParams, vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """config.json as transformers writes it for this architecture."""
    values = {**params.model_dump(), "head_dim": params.head_width}
    config = {
        "architectures": [_MODEL_CLASS[params.architecture]],
        "model_type": params.architecture,
        "vocab_size": vocab_size,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }
    if params.architecture == "gpt2":
        config |= {key: values[name] for name, key in _GPT2_KEYS.items()}
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop"), params.dropout)
        return {**config, **dropout, "activation_function": "gelu_new", "n_ctx": params.context_length}
    config |= {key: values[name] for name, key in _LLAMA_KEYS.items()}
    rope = {"rope_theta": params.rope_theta, "rope_type": "default"}
    return {**config, "attention_bias": False, "hidden_act": "silu", "rope_parameters": rope}


def from_config(config: dict[str, Any], folder: Path) -> ModelParams:
    """The section `model` that describes a config.json, this project's or another's. Raises InputError."""
    architecture = str(config.get("model_type"))
    if architecture not in _MODEL_CLASS:
        known = ", ".join(_MODEL_CLASS)
        raise InputError(f"{folder / CONFIG}: model_type {architecture!r} is none of {known}; choose another model")
    if unknown := [f"{key} {config[key]!r}" for key, value in _FIXED.items() if config.get(key, value) != value]:
        raise InputError(f"{folder / CONFIG}: not supported: {', '.join(unknown)}; choose another model")
    given = {key: value for key, value in config.items() if value is not None}
    try:
        if architecture == "gpt2":
            given = {"n_inner": 4 * config["n_embd"], **_GPT2_DEFAULTS, **given}
            values = {name: given[key] for name, key in _GPT2_KEYS.items()}
            values |= {"n_kv_head": values["n_head"], "head_dim": None, "rope_theta": 10000.0}
        else:
            rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
            if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
                raise InputError(f"{folder / CONFIG}: rotary positions of type {kind!r} are not supported")
            given = {"num_key_value_heads": config["num_attention_heads"], **_LLAMA_DEFAULTS, **given}
            values = {name: given[key] for name, key in _LLAMA_KEYS.items()}
            values["rope_theta"] = float(rope.get("rope_theta") or given["rope_theta"])
        values["dropout"] = float(values["dropout"])
        return ModelParams.model_validate({"architecture": architecture, **values})
    except ValidationError as error:
        reason = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
        raise InputError(f"{folder / CONFIG}: not a usable configuration: {reason}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG}: not a usable configuration: {type(error).__name__}: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises InputError."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / CONFIG}: not readable ({error}); name a model folder in Hugging Face layout"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise InputError(f"{folder / CONFIG}: has no vocab_size; name a model folder in Hugging Face layout")
    return config


def initialise_from(model: GPT, folder: Path) -> None:
    """Start `model` from the weights of a folder whose shape must be the one that params.yaml describes.

    Raises ConfigError that lists what differs, InputError, IntegrityError.
    """
    config = read_config(folder)
    if (folder / MANIFEST).exists():
        verify(folder)  # one of ours: safetensors has no checksum
    theirs, ours = from_config(config, folder), model.params
    free = {"dropout", "head_dim"}  # these change no tensor, or are compared as head_width
    if ours.architecture != "gpt2" or ours.context_length < theirs.context_length:
        free.add("context_length")  # learned positions can be cut, not grown
    different = [
        f"model.{name} is {getattr(ours, name)}, the folder has {getattr(theirs, name)}"
        for name in type(ours).model_fields
        if name not in free and getattr(ours, name) != getattr(theirs, name)
    ]
    if ours.head_width != theirs.head_width:
        different.append(f"model.head_dim is {ours.head_width}, the folder has {theirs.head_width}")
    if config["vocab_size"] != model.vocab_size:
        different.append(f"the tokenizer has {model.vocab_size} entries, the folder has {config['vocab_size']}")
    if different:
        raise ConfigError(f"train.init_from {folder}: {'; '.join(different)}; set params.yaml to the folder's values")
    load_weights(model, folder)


def _to_their_names(weights: dict[str, Tensor], params: ModelParams) -> dict[str, Tensor]:
    theirs: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not (params.tie_embeddings and name == "head.weight"):
            their_names = _their_names(name, params)
            parts = torch.split(value, qkv_widths(params)) if len(their_names) == 3 else [value]
            theirs |= {key: _transposed(name, part, params) for key, part in zip(their_names, parts, strict=True)}
    return theirs


def _to_our_names(theirs: dict[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """The reverse, by asking for each of our names what theirs is; what they store beside weights is left out."""
    if "wte.weight" in theirs:  # GPT-2 without the prefix, as in OpenAI's own upload
        theirs = {f"transformer.{name}": value for name, value in theirs.items()}
    ours: dict[str, Tensor] = {}
    for name, _ in model.named_parameters():
        parts = [theirs[key] for key in _their_names(name, model.params)]
        ours[name] = _transposed(name, torch.cat(parts) if len(parts) > 1 else parts[0], model.params)
    return ours


def _their_names(name: str, params: ModelParams) -> list[str]:
    """Queries, keys and values have a matrix each in Llama and Qwen3."""
    table = _GPT2_NAMES if params.architecture == "gpt2" else _LLAMA_NAMES
    theirs = ".".join(table.get(part, part) for part in name.split("."))
    return [theirs.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"] if "qkv_proj" in theirs else [theirs]


def _transposed(name: str, value: Tensor, params: ModelParams) -> Tensor:
    """GPT-2 keeps the matrices of its blocks as (in, out), torch as (out, in)."""
    return value.mT if params.architecture == "gpt2" and "_proj.weight" in name else value

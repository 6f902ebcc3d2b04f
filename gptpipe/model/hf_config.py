"""config.json in Hugging Face layout, and the section `model` of params.yaml that it describes."""

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from gptpipe.base.files import read_bytes
from gptpipe.base.manifest import MANIFEST
from gptpipe.model.params import ModelParams
from gptpipe.shell.errors import InputError

CONFIG = "config.json"

# Limits on the values in config.json, which may come from anywhere. The config.json of Llama 3.1 405B has 0.1
# MB, and the longest context of a published model of these architectures is 1 million positions.
MAX_JSON_BYTES = 1 << 20
_MAX_VOCAB_SIZE = 1 << 31
_MAX_CONTEXT_LENGTH = 1 << 21

_MODEL_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

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
# The values that transformers uses for keys that are missing or null.
_LLAMA_DEFAULTS = {
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "head_dim": None,
}
_GPT2_DEFAULTS = {"resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

# Switches that our network does not have, with the only value that it supports.
_SUPPORTED_VALUES = {
    "activation_function": "gelu_new",
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_sliding_window": False,
}


def config_of(params: ModelParams, vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """The content of config.json, in the form that transformers writes for this architecture."""
    values = {**params.model_dump(), "head_dim": params.resolved_head_dim}
    config: dict[str, Any] = {
        "architectures": [_MODEL_CLASSES[params.architecture]],
        "model_type": params.architecture,
        "vocab_size": vocab_size,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }
    if params.architecture == "gpt2":
        config |= {key: values[name] for name, key in _GPT2_KEYS.items()}
        config |= {"attn_pdrop": params.dropout, "embd_pdrop": params.dropout}
        return {**config, "activation_function": "gelu_new", "n_ctx": params.context_length}
    config |= {key: values[name] for name, key in _LLAMA_KEYS.items()}
    config |= {"attention_bias": False, "hidden_act": "silu"}
    # transformers 5 reads rope_theta in rope_parameters. Version 4 reads it only here, else assumes 10,000.
    config["rope_theta"] = params.rope_theta
    return {**config, "rope_parameters": {"rope_theta": params.rope_theta, "rope_type": "default"}}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json in a model folder; `vocab_size` is checked. Raises InputError."""
    path = path_inside(folder, CONFIG)
    try:
        config = from_json(read_bytes(path, MAX_JSON_BYTES), allow_inf_nan=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable ({error}); name a model folder in Hugging Face layout"
        ) from error
    vocab_size = config.get("vocab_size") if isinstance(config, dict) else None
    if type(vocab_size) is not int or not 0 < vocab_size < _MAX_VOCAB_SIZE:
        raise InputError(
            f"{path}: has no vocab_size that is a positive whole number below 2^31; "
            "name a model folder in Hugging Face layout"
        )
    checked: dict[str, Any] = config
    return checked


def params_of(config: dict[str, Any], folder: Path) -> ModelParams:
    """The section `model` that config.json describes; `folder` is for messages. Raises InputError."""
    path = folder / CONFIG
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or architecture not in _MODEL_CLASSES:
        known = ", ".join(_MODEL_CLASSES)
        raise InputError(f"{path}: model_type {architecture!r:.50} is none of {known}; choose another model")
    unsupported = [
        f"{key} {config[key]!r:.50}"
        for key, supported in _SUPPORTED_VALUES.items()
        if config.get(key, supported) != supported
    ]
    if unsupported:
        raise InputError(f"{path}: not supported: {', '.join(unsupported)}; choose another model")
    try:
        values = _gpt2_values(config) if architecture == "gpt2" else _llama_values(config, path)
        params = ModelParams.model_validate({"architecture": architecture, **values})
    except ValidationError as error:
        reason = "; ".join(f"{detail['loc'][-1]}: {detail['msg']}" for detail in error.errors())
        raise InputError(f"{path}: not a usable configuration: {reason}; choose another model") from error
    except KeyError as error:
        raise InputError(
            f"{path}: not a usable configuration: no {error.args[0]}; choose another model"
        ) from error
    except (TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a usable configuration: {reason}; choose another model") from error
    if params.context_length > _MAX_CONTEXT_LENGTH:
        raise InputError(
            f"{path}: a context of {params.context_length:,} tokens is not supported, the limit is "
            f"{_MAX_CONTEXT_LENGTH:,}; choose another model"
        )
    return params


def with_shape_of(params: ModelParams, folder: Path) -> ModelParams:
    """`params` with the shape of the model in `folder`. The context length and the dropout of a training stay.

    Raises InputError.
    """
    shape = params_of(read_config(folder), folder)
    return shape.model_copy(update={"context_length": params.context_length, "dropout": params.dropout})


def _gpt2_values(config: dict[str, Any]) -> dict[str, Any]:
    """Values of the section `model` by name. Raises KeyError, TypeError."""
    completed = {"n_inner": 4 * config["n_embd"], **_GPT2_DEFAULTS, **_without_nulls(config)}
    values = {name: completed[key] for name, key in _GPT2_KEYS.items()}
    return {**values, "n_kv_head": values["n_head"], "head_dim": None, "rope_theta": 10000.0}


def _llama_values(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Values of the section `model` by name, also for Qwen3.

    Raises InputError, KeyError, TypeError, AttributeError.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InputError(
            f"{path}: rotary positions of type {rope_type!r:.50} are not supported; choose another model"
        )
    one_per_query = {"num_key_value_heads": config["num_attention_heads"]}
    completed = {**one_per_query, **_LLAMA_DEFAULTS, **_without_nulls(config)}
    values = {name: completed[key] for name, key in _LLAMA_KEYS.items()}
    return {**values, "rope_theta": rope.get("rope_theta") or completed["rope_theta"]}


def _without_nulls(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def path_inside(folder: Path, name: str) -> Path:
    """The path of a file in a model folder. Raises InputError if it is a link that leads out of the folder.

    Two kinds of links are allowed. In a Hugging Face cache, `snapshots/<revision>` consists of links to
    `blobs`. In a folder with a manifest, which pins the content of its files, DVC may replace files by links.
    """
    home, target = (Path(os.path.realpath(path)) for path in (folder, folder / name))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parents[1] / "blobs")
    if not any(map(target.is_relative_to, allowed)) and not (folder / MANIFEST).exists():
        raise InputError(f"{folder / name}: a link out of the folder; replace it with a copy of the file")
    return folder / name

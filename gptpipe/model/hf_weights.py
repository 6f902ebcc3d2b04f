"""The folder layout that the Hugging Face ecosystem reads: config.json, generation_config.json, model.safetensors.

A folder may come from anywhere. The sizes in config.json are compared with the tensor shapes in the headers of the
safetensors files, and with the free memory, before anything of these sizes is allocated.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from gptpipe.base.files import read_bytes, read_json, write_bytes, write_json
from gptpipe.base.manifest import MANIFEST, verify
from gptpipe.model.device import available_memory, memory_errors
from gptpipe.model.gpt import GPT, qkv_widths
from gptpipe.model.params import ModelParams
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, ResourceError, first_line

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

# Limits on what a folder may claim. config.json, the index and the header of Llama 3.1 405B take 0.1 MB each, and the
# longest context of a published model of these architectures is 1 million positions.
_MAX_JSON_BYTES = 1 << 20
_MAX_VOCAB_SIZE = 1 << 31
_MAX_CONTEXT_LENGTH = 1 << 21
_FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}  # others are quantized; their numbers alone mean nothing
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}\.safetensors")

# Tensors that are stored beside the weights and can be computed: masks of GPT-2, frequencies of Llama.
_COMPUTED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

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

    Raises InputError for a folder that this project cannot read, IntegrityError for weights that do not fit it,
    ResourceError for a model that does not fit in memory.
    """
    config = read_config(folder)
    params, vocab_size = from_config(config, folder), config["vocab_size"]
    stored = stored_tensors(folder)
    _check_sizes(params, vocab_size, stored, folder)
    with memory_errors(f"{folder}: out of memory; make memory free, or choose a smaller model"):
        model = GPT(params, vocab_size)
        _check_fit(stored, model, folder)
        _fill(model, folder)
    return model


def load_weights(model: GPT, folder: Path) -> None:
    """Fill a network with the weights of a folder, whose tensors must fit it.

    Of learned positions the first `context_length` are taken. Raises InputError, IntegrityError, ResourceError.
    """
    _check_fit(stored_tensors(folder), model, folder)
    with memory_errors(f"{folder}: out of memory; make memory free, or choose a smaller model"):
        _fill(model, folder)


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says about a tensor."""

    dtype: str  # by the names of safetensors, such as BF16
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; reads the header alone. Raises OSError, ValueError, SafetensorError.

    safetensors compares types, shapes and offsets with each other and with the size of the file.
    """
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
    if n_bytes > _MAX_JSON_BYTES:
        raise ValueError(f"its header claims {n_bytes:,} bytes, the limit is {_MAX_JSON_BYTES:,}")
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return {name: StoredTensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by their names in it. Raises InputError, IntegrityError."""
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            header = read_header(path)
            if twice := sorted(stored.keys() & header.keys()):
                raise ValueError(f"{twice[0]!r:.100} is in another file too")
        except (OSError, ValueError, SafetensorError) as error:
            raise IntegrityError(f"{path}: cannot be read: {first_line(error):.200}; fetch the model again") from error
        stored |= header
    return stored


class _Index(BaseModel):
    """model.safetensors.index.json: which file holds which tensor."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that an index names. Raises InputError."""
    index = folder / f"{WEIGHTS}.index.json"
    names = [WEIGHTS]
    if os.path.lexists(index):
        try:
            names = sorted(set(read_json(_inside(folder, index.name), _Index, _MAX_JSON_BYTES).weight_map.values()))
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise InputError(f"{index}: not an index of safetensors files ({reason}); fetch the model again") from error
        if strange := [name for name in names if not _SAFE_NAME.fullmatch(name)]:
            raise InputError(f"{index}: {strange[0]!r:.100} is not a plain file name; fetch the model again")
    paths = [_inside(folder, name) for name in names]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: not there; weights must be in safetensors files")
    return paths


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
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or architecture not in _MODEL_CLASS:
        known = ", ".join(_MODEL_CLASS)
        raise InputError(f"{folder / CONFIG}: model_type {architecture!r:.50} is none of {known}; choose another model")
    if unknown := [f"{key} {config[key]!r:.50}" for key, value in _FIXED.items() if config.get(key, value) != value]:
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
                raise InputError(f"{folder / CONFIG}: rotary positions of type {kind!r:.50} are not supported")
            given = {"num_key_value_heads": config["num_attention_heads"], **_LLAMA_DEFAULTS, **given}
            values = {name: given[key] for name, key in _LLAMA_KEYS.items()}
            values["rope_theta"] = rope.get("rope_theta") or given["rope_theta"]
        params = ModelParams.model_validate({"architecture": architecture, **values})
    except ValidationError as error:
        reason = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
        raise InputError(f"{folder / CONFIG}: not a usable configuration: {reason}") from error
    except KeyError as error:
        raise InputError(f"{folder / CONFIG}: not a usable configuration: no {error.args[0]}") from error
    except (TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG}: not a usable configuration: {type(error).__name__}: {error}") from error
    if params.context_length > _MAX_CONTEXT_LENGTH:
        raise InputError(
            f"{folder / CONFIG}: a context of {params.context_length:,} tokens is not supported, the limit is "
            f"{_MAX_CONTEXT_LENGTH:,}; choose another model"
        )
    return params


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises InputError."""
    path = _inside(folder, CONFIG)
    try:
        config = from_json(read_bytes(path, _MAX_JSON_BYTES), allow_inf_nan=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); name a model folder in Hugging Face layout") from error
    vocab_size = config.get("vocab_size") if isinstance(config, dict) else None
    if type(vocab_size) is not int or not 0 < vocab_size < _MAX_VOCAB_SIZE:
        raise InputError(
            f"{path}: has no vocab_size that is a positive whole number below 2^31; name a model folder in Hugging "
            "Face layout"
        )
    checked: dict[str, Any] = config
    return checked


def initialise_from(model: GPT, folder: Path) -> None:
    """Start `model` from the weights of a folder whose shape must be the one that params.yaml describes.

    Raises ConfigError that lists what differs, InputError, IntegrityError.
    """
    if (folder / MANIFEST).exists():
        verify(folder)  # one of ours: safetensors has no checksum
    config = read_config(folder)
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


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder, which must not be a link to somewhere else. Raises InputError.

    Allowed are links to the blobs of a Hugging Face cache, whose `snapshots/<revision>` consist of them. The manifest
    of a folder pins the content of its files, so that their links do not matter: DVC makes some if told to.
    """
    home, target = (Path(os.path.realpath(path)) for path in (folder, folder / name))
    roots = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(map(target.is_relative_to, roots)) and not (folder / MANIFEST).exists():
        raise InputError(f"{folder / name}: a link out of the folder; replace it with a copy of the file")
    return folder / name


def _check_sizes(params: ModelParams, vocab_size: int, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Compare the sizes in config.json with what is stored, before a network of these sizes takes memory.

    An outline on torch's device `meta` would do, but its first use imports 800 modules. Raises IntegrityError,
    ResourceError.
    """
    attention, feed_forward = params.n_head * params.head_width, params.n_inner
    matrices = {
        "embedding.weight": {vocab_size, params.n_embd},
        "blocks.0.attention.o_proj.weight": {params.n_embd, attention},
        "blocks.0.feed_forward.up_proj.weight": {params.n_embd, feed_forward},
    }
    prefixed = _with_prefix(stored)
    for name, sizes in matrices.items():
        theirs = _their_names(name, params)[0]
        if theirs not in prefixed or {*prefixed[theirs].shape} != sizes:
            found = prefixed[theirs].shape if theirs in prefixed else "missing"
            raise IntegrityError(f"{folder}: its weights do not fit its {CONFIG}: {theirs} is {found}; fetch it again")
    n_stored = sum(math.prod(tensor.shape) for tensor in stored.values())
    if params.n_layer * params.n_embd * (attention + feed_forward) > n_stored:
        raise IntegrityError(
            f"{folder}: its weights do not fit its {CONFIG}: too few for {params.n_layer} layers; fetch it again"
        )
    tables = 2 * params.context_length * params.head_width
    needed = 4 * (n_stored + 2 * tables)  # tables twice: while they are made
    available = available_memory(torch.device("cpu"))
    if needed > available:
        raise ResourceError(
            f"{folder}: the model takes about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} are "
            "available; choose a smaller model"
        )


def _check_fit(stored: dict[str, StoredTensor], model: GPT, folder: Path) -> None:
    """Raises IntegrityError unless the stored tensors are those of the network."""
    stored = _with_prefix(stored)
    outlines = {name: parameter.detach().to("meta") for name, parameter in model.named_parameters()}
    wanted = {name: tuple(tensor.shape) for name, tensor in _to_their_names(outlines, model.params).items()}
    positions = _their_names("position_embedding.weight", model.params)
    faults = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        shape, found = wanted[name], stored[name]
        can_be_cut = name in positions and found.shape[1:] == shape[1:] and found.shape[:1] > shape[:1]
        if found.shape != shape and not can_be_cut:
            faults.append(f"{name} has shape {found.shape}, not {shape}")
        if found.dtype not in _FLOAT_TYPES:
            faults.append(f"{name} has type {found.dtype}, which is not supported")
    tied = _their_names("head.weight", model.params) if model.params.tie_embeddings else []
    for name in sorted(stored.keys() - wanted.keys() - {*tied}):
        if not name.endswith(_COMPUTED):
            faults.append(f"{name!r:.100} is no tensor of this network")
    if faults:
        more = f", and {len(faults) - 1} faults more" if len(faults) > 1 else ""
        raise IntegrityError(f"{folder}: its weights do not fit its {CONFIG}: {faults[0]}{more}; fetch the model again")


def _fill(model: GPT, folder: Path) -> None:
    """Copy weights that fit into a network."""
    try:
        theirs = {name: value for path in weight_files(folder) for name, value in load_file(path).items()}
        ours = _to_our_names(_with_prefix(theirs), model)
        if "position_embedding.weight" in ours:
            ours["position_embedding.weight"] = ours["position_embedding.weight"][: model.params.context_length]
        if model.params.tie_embeddings:
            ours["head.weight"] = ours["embedding.weight"]
        model.load_state_dict({name: value.float() for name, value in ours.items()})
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{folder}: its weights cannot be read: {first_line(error):.300}") from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise IntegrityError(f"{folder}: weights that are NaN or infinite; fetch or train the model again")


def _with_prefix(theirs: dict[str, Any]) -> dict[str, Any]:
    """GPT-2 without the prefix of its names, as in OpenAI's own upload, gets it."""
    return {f"transformer.{name}": value for name, value in theirs.items()} if "wte.weight" in theirs else theirs


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

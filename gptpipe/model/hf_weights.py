"""Weights in the Hugging Face layout: save them, check them, load them, and start a training from them.

A model folder may come from anywhere. Before anything is allocated, the sizes in config.json are compared with
the shapes in the headers of the safetensors files and with the free memory.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from gptpipe.base.files import read_json, write_bytes, write_json
from gptpipe.base.manifest import MANIFEST, verify
from gptpipe.model.device import available_memory, memory_errors
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_config import CONFIG, MAX_JSON_BYTES, config_of, params_of, path_inside, read_config
from gptpipe.model.hf_names import from_hf, hf_names, to_hf, with_prefix
from gptpipe.model.params import ModelParams
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, ResourceError, first_line

WEIGHTS = "model.safetensors"

_FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}  # other types are quantized and need more than their numbers
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}\.safetensors")

# Ends of the names of stored tensors that are not weights: masks of GPT-2, rotary frequencies of Llama.
_COMPUTED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def save_model(
    folder: Path, params: ModelParams, vocab_size: int, end_of_text: int, weights: dict[str, Tensor]
) -> None:
    """Write model.safetensors, config.json and generation_config.json;

    `weights` are the parameters by our names.
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in to_hf(weights, params).items()}
    write_bytes(folder / WEIGHTS, save(stored, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config_of(params, vocab_size, end_of_text))
    generation = {"do_sample": True, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    write_json(folder / "generation_config.json", generation)


def load_model(folder: Path) -> GPT:
    """The network of a model folder, in float32 on the CPU. The caller has verified the folder.

    Raises InputError for a folder that cannot be read, IntegrityError if its weights do not fit its
    config.json, ResourceError if the model does not fit in memory.
    """
    config = read_config(folder)
    params, vocab_size = params_of(config, folder), config["vocab_size"]
    stored = stored_tensors(folder)
    _check_sizes(params, vocab_size, stored, folder)
    _check_memory(params, stored, folder)
    with memory_errors(lambda: f"{folder}: out of memory; free some memory, or choose a smaller model"):
        model = GPT(params, vocab_size)
        _check_tensors(stored, model, folder)
        _copy_weights(model, folder)
    return model


def load_weights(model: GPT, folder: Path) -> None:
    """Copy the weights of a folder into a network that they fit.

    If the folder has more learned positions, the first `context_length` are used. Raises InputError,
    IntegrityError, ResourceError.
    """
    _check_tensors(stored_tensors(folder), model, folder)
    with memory_errors(lambda: f"{folder}: out of memory; free some memory, or choose a smaller model"):
        _copy_weights(model, folder)


def initialise_from(model: GPT, folder: Path) -> None:
    """Start a training from the weights of a folder. `model` has the shape that params.yaml describes.

    Raises ConfigError with all differences between the two shapes, InputError, IntegrityError, ResourceError.
    """
    if (folder / MANIFEST).exists():
        verify(folder)  # safetensors files have no checksum
    config = read_config(folder)
    differences = _differences(model.params, params_of(config, folder))
    if config["vocab_size"] != model.vocab_size:
        differences.append(
            f"the tokenizer has {model.vocab_size} entries, the folder has {config['vocab_size']}"
        )
    if differences:
        raise ConfigError(
            f"train.init_from {folder}: {'; '.join(differences)}; set params.yaml to the folder's values"
        )
    load_weights(model, folder)


def _differences(ours: ModelParams, theirs: ModelParams) -> list[str]:
    """Parameters that must be equal to start a training from a folder, and are not."""
    # Dropout has no weights; of head_dim the resolved value is compared below.
    ignored = {"dropout", "head_dim"}
    if ours.architecture != "gpt2" or ours.context_length < theirs.context_length:
        ignored.add("context_length")  # learned positions can be cut off, but not added
    pairs = {
        name: (getattr(ours, name), getattr(theirs, name))
        for name in type(ours).model_fields
        if name not in ignored
    }
    pairs["head_dim"] = (ours.resolved_head_dim, theirs.resolved_head_dim)
    return [
        f"model.{name} is {own}, the folder has {their}" for name, (own, their) in pairs.items() if own != their
    ]


@dataclass(frozen=True)
class StoredTensor:
    """The type and shape of a tensor in the header of a safetensors file."""

    dtype: str  # in the notation of safetensors, such as BF16
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by their stored names. Raises InputError, IntegrityError."""
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            header = read_header(path)
            repeated = sorted(stored.keys() & header.keys())
            if repeated:
                raise ValueError(f"{repeated[0]!r:.100} is in another file too")
        except (OSError, ValueError, SafetensorError) as error:
            raise IntegrityError(
                f"{path}: cannot be read: {first_line(error):.200}; fetch the model again"
            ) from error
        stored |= header
    return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, from its header.

    The library checks that types, shapes and offsets agree with each other and with the size of the file.
    Raises OSError, ValueError, SafetensorError.
    """
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
    if n_bytes > MAX_JSON_BYTES:
        raise ValueError(f"its header claims {n_bytes:,} bytes, the limit is {MAX_JSON_BYTES:,}")
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return {name: StoredTensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


class _Index(BaseModel):
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: a single one, or the shards that its index lists.

    Raises InputError.
    """
    index = folder / f"{WEIGHTS}.index.json"
    names = _shard_names(index) if os.path.lexists(index) else [WEIGHTS]
    paths = [path_inside(folder, name) for name in names]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: not there; weights must be in safetensors files")
    return paths


def _shard_names(index: Path) -> list[str]:
    """The file names in an index, sorted. Raises InputError."""
    try:
        content = read_json(path_inside(index.parent, index.name), _Index, MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"{index}: not an index of safetensors files ({reason}); fetch the model again"
        ) from error
    names = sorted(set(content.weight_map.values()))
    for name in names:
        if not _SAFE_NAME.fullmatch(name):
            raise InputError(f"{index}: {name!r:.100} is not a plain file name; fetch the model again")
    return names


def _check_sizes(params: ModelParams, vocab_size: int, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Compare the sizes in config.json with the stored shapes, before a network of these sizes is allocated.

    A network on torch's device `meta` would show the same, but its first use imports 800 modules. Raises
    IntegrityError.
    """
    attention_width = params.n_head * params.resolved_head_dim
    matrices = {
        "embedding.weight": {vocab_size, params.n_embd},
        "blocks.0.attention.o_proj.weight": {params.n_embd, attention_width},
        "blocks.0.feed_forward.up_proj.weight": {params.n_embd, params.n_inner},
    }
    prefixed = with_prefix(stored)
    for name, sizes in matrices.items():
        hf_name = hf_names(name, params)[0]
        shape = prefixed[hf_name].shape if hf_name in prefixed else None
        if shape is None or set(shape) != sizes:
            actual = "missing" if shape is None else shape
            raise IntegrityError(
                f"{folder}: its weights do not fit its {CONFIG}: {hf_name} is {actual}; fetch it again"
            )
    if params.n_layer * params.n_embd * (attention_width + params.n_inner) > _n_stored(stored):
        raise IntegrityError(
            f"{folder}: its weights do not fit its {CONFIG}: too few for {params.n_layer} layers; "
            "fetch it again"
        )


def _check_memory(params: ModelParams, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Raises ResourceError if the network does not fit in memory: its weights and rotary tables, in float32."""
    tables = 2 * params.context_length * params.resolved_head_dim
    needed = 4 * (_n_stored(stored) + 2 * tables)  # building the tables takes twice their size
    available = available_memory(torch.device("cpu"))
    if needed > available:
        raise ResourceError(
            f"{folder}: the model takes about {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available; choose a smaller model"
        )


def _n_stored(stored: dict[str, StoredTensor]) -> int:
    """The number of stored weights."""
    return sum(math.prod(tensor.shape) for tensor in stored.values())


def _check_tensors(stored: dict[str, StoredTensor], model: GPT, folder: Path) -> None:
    """Raises IntegrityError unless the stored tensors are exactly those of the network."""
    faults = _tensor_faults(with_prefix(stored), model)
    if faults:
        others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise IntegrityError(
            f"{folder}: its weights do not fit its {CONFIG}: {faults[0]}{others}; fetch the model again"
        )


def _tensor_faults(stored: dict[str, StoredTensor], model: GPT) -> list[str]:
    """Tensors that are missing or unknown, or that have another shape or an unsupported type."""
    params = model.params
    outlines = {name: parameter.detach().to("meta") for name, parameter in model.named_parameters()}
    expected = {name: tuple(tensor.shape) for name, tensor in to_hf(outlines, params).items()}
    positions = hf_names("position_embedding.weight", params)
    faults = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        shape, tensor = expected[name], stored[name]
        can_be_cut = name in positions and tensor.shape[1:] == shape[1:] and tensor.shape[:1] > shape[:1]
        if tensor.shape != shape and not can_be_cut:
            faults.append(f"{name} has shape {tensor.shape}, not {shape}")
        if tensor.dtype not in _FLOAT_TYPES:
            faults.append(f"{name} has type {tensor.dtype}, which is not supported")
    tied_head = hf_names("head.weight", params) if params.tie_embeddings else []
    for name in sorted(stored.keys() - expected.keys() - set(tied_head)):
        if not name.endswith(_COMPUTED):
            faults.append(f"{name!r:.100} is no tensor of this network")
    return faults


def _copy_weights(model: GPT, folder: Path) -> None:
    """Copy the weights of a folder into a network, after `_check_tensors`.

    Raises InputError, IntegrityError.
    """
    try:
        stored: dict[str, Tensor] = {}
        for path in weight_files(folder):
            stored |= load_file(path)
        weights = from_hf(with_prefix(stored), model)
        if "position_embedding.weight" in weights:
            positions = weights["position_embedding.weight"]
            weights["position_embedding.weight"] = positions[: model.params.context_length]
        if model.params.tie_embeddings:
            weights["head.weight"] = weights["embedding.weight"]
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"{folder}: its weights cannot be read: {first_line(error):.300}; fetch the model again"
        ) from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise IntegrityError(f"{folder}: weights that are NaN or infinite; fetch or train the model again")

"""A model as a GGUF file, the format of llama.cpp and ollama: names, shapes and number types of its tensors,
its configuration and its vocabulary. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from torch import Tensor

from gptpipe.base.files import new_file
from gptpipe.formats.hf_tokenizer import merges_of
from gptpipe.formats.tokenizer import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    GPT4O_PATTERN,
    PATTERN,
    Tokenizer,
    byte_letters,
)
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_names import to_hf
from gptpipe.model.params import ModelParams
from gptpipe.shell.errors import InputError, IntegrityError

NumberType = Literal["f32", "f16", "q8_0"]
Array = npt.NDArray[np.float32]

BLOCK = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]  # numbers of a row that share a scale: 32
_TENSOR_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}

# llama.cpp has no regular expressions in its files, only names of patterns that it knows.
_PATTERN_NAMES = {PATTERN: "qwen35", GPT2_PATTERN: "gpt-2", GPT4_PATTERN: "llama-bpe", GPT4O_PATTERN: "gpt-4o"}

# Parts of names in Hugging Face layout -> those of llama.cpp.
_TOP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor under its name in the file, and the type of its numbers there."""

    name: str
    values: Array
    kind: gguf.GGMLQuantizationType


def write_gguf(
    path: Path, model: GPT, tokenizer: Tokenizer, number_type: NumberType, card: Mapping[str, Any] | None = None
) -> None:
    """Write the model, read the file back, and let it appear under `path` only if it contains what it should.

    `card` are keys that describe the model in words (`gguf_card.card_fields`). Memory: the model, and one more
    tensor. Raises InputError for a model that the format cannot express, IntegrityError for a file that reads
    back differently, ResourceError for a full disk.
    """
    fields = {**_configuration(model, number_type), **_vocabulary(tokenizer), **(card or {})}
    tensors = list(gguf_tensors(model, number_type))
    with new_file(path) as file:
        # The writer opens the unfinished file a second time.
        with closing(gguf.GGUFWriter(file.name, model.params.architecture)) as writer:
            _write(writer, fields, tensors)
        _check_file(Path(file.name), fields, tensors)


def _write(writer: gguf.GGUFWriter, fields: dict[str, Any], tensors: Sequence[GGUFTensor]) -> None:
    """Write everything, and convert the numbers of one tensor after another."""
    for key, value in fields.items():
        _add(writer, key, value)
    for tensor in tensors:
        shape = tensor.values.shape
        n_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, tensor.kind)))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(encode(tensor))


def pattern_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of the pattern that cuts text into pieces. Raises InputError if it has none."""
    name = _PATTERN_NAMES.get(tokenizer.pattern)
    if name is None:
        raise InputError(
            f"the vocabulary {tokenizer.encoding.name!r} cuts text by a pattern that llama.cpp does not know; "
            "train the model again with the vocabulary of this version, or load models/gpt with transformers"
        )
    return name


def _configuration(model: GPT, number_type: NumberType) -> dict[str, Any]:
    """The keys of the file that describe the network."""
    params = model.params
    name = params.architecture
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": "gpt",
        "general.size_label": gguf.size_label(model.n_parameters(), 0, 0, expert_count=0),
        "general.file_type": int(_FILE_TYPES[number_type]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{name}.vocab_size": model.vocab_size,
        f"{name}.context_length": params.context_length,
        f"{name}.embedding_length": params.n_embd,
        f"{name}.block_count": params.n_layer,
        f"{name}.feed_forward_length": params.n_inner,
        f"{name}.attention.head_count": params.n_head,
        f"{name}.attention.head_count_kv": params.n_kv_head,
        f"{name}.attention.key_length": params.resolved_head_dim,
        f"{name}.attention.value_length": params.resolved_head_dim,
    }
    if name == "gpt2":
        return {**fields, "gpt2.attention.layer_norm_epsilon": params.norm_eps}
    return {
        **fields,
        f"{name}.attention.layer_norm_rms_epsilon": params.norm_eps,
        f"{name}.rope.freq_base": params.rope_theta,
        f"{name}.rope.dimension_count": params.resolved_head_dim,
    }


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of the file that describe the vocabulary. Raises InputError for an unknown pattern."""
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    texts = {rank: spell(token) for token, rank in tokenizer.ranks.items()}
    special = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    ids = range(tokenizer.vocab_size)
    # An id without a token has a name that no text can spell: a space is never written as a space.
    tokens = [special.get(i) or texts.get(i) or f"unused {i}" for i in ids]
    kinds = {"special": gguf.TokenType.CONTROL, "text": gguf.TokenType.NORMAL, "unused": gguf.TokenType.UNUSED}
    return {
        "tokenizer.ggml.model": "gpt2",  # byte-level BPE
        "tokenizer.ggml.pre": pattern_name(tokenizer),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            int(kinds["special" if i in special else "text" if i in texts else "unused"]) for i in ids
        ],
        "tokenizer.ggml.merges": [
            f"{spell(left)} {spell(right)}" for left, right in merges_of(tokenizer.ranks)
        ],
        "tokenizer.ggml.bos_token_id": tokenizer.end_of_text,
        "tokenizer.ggml.eos_token_id": tokenizer.end_of_text,
        "tokenizer.ggml.add_bos_token": False,  # documents start without a token of their own
        "tokenizer.ggml.add_eos_token": False,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key: integers as uint32, except in arrays, as llama.cpp expects them."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # an empty array is left out
        writer.add_array(key, value)


def gguf_tensors(model: GPT, number_type: NumberType) -> Iterator[GGUFTensor]:
    """The weights of the model under their names in the file.

    Norms, biases and learned positions stay float32, as in llama.cpp's own files. A row that is no multiple of
    32 numbers cannot be quantized, and is stored in float16.
    """
    params = model.params
    for hf_name, value in to_hf(dict(model.named_parameters()), params).items():
        name = _gguf_name(hf_name)
        matrix = _as_llama_cpp(name, value.detach().cpu(), params)
        kind = _TENSOR_TYPES[number_type]
        if matrix.dim() == 1 or name.startswith("position_embd"):
            kind = gguf.GGMLQuantizationType.F32
        elif kind == gguf.GGMLQuantizationType.Q8_0 and matrix.shape[-1] % BLOCK:
            kind = gguf.GGMLQuantizationType.F16
        yield GGUFTensor(name, matrix.numpy(), kind)


def _gguf_name(hf_name: str) -> str:
    """`blk.3.attn_q.weight` for `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, ending = hf_name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{ending}"
    _, _, layer, part = stem.split(".", maxsplit=3)
    return f"blk.{layer}.{_BLOCK_NAMES[part]}.{ending}"


def _as_llama_cpp(name: str, value: Tensor, params: ModelParams) -> Tensor:
    """Rows (out, in). llama.cpp's Llama rotates pairs (2i, 2i + 1) of a head, and we rotate (i, i + H/2)."""
    if params.architecture == "gpt2" and value.dim() == 2 and name.startswith("blk."):
        return value.mT.contiguous()  # Hugging Face layout stores these matrices as (in, out)
    if params.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        halves = value.view(-1, 2, params.resolved_head_dim // 2, value.shape[-1])  # (N or K, 2, H/2, D)
        return halves.transpose(1, 2).reshape(value.shape)
    return value.contiguous()


def encode(tensor: GGUFTensor) -> npt.NDArray[Any]:
    """The numbers of a tensor as the file contains them. Raises InputError for a weight beyond float16."""
    with np.errstate(over="ignore"):
        encoded: npt.NDArray[Any] = gguf.quants.quantize(tensor.values, tensor.kind)
    if tensor.kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise InputError(f"{tensor.name}: a weight is beyond the range of float16; use --type f32")
    return encoded


def _check_file(path: Path, fields: dict[str, Any], tensors: Sequence[GGUFTensor]) -> None:
    """Raises IntegrityError unless the file contains these fields and tensors, and no others."""
    reader = gguf.GGUFReader(path)
    for key, value in fields.items():
        field = reader.get_field(key)
        content = None if field is None else field.contents()
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if (content or value) and content != expected:
            raise IntegrityError(
                f"{path}: {key} reads back as {content!r:.60}, not {value!r:.60}; export it again"
            )
    if [tensor.name for tensor in reader.tensors] != [tensor.name for tensor in tensors]:
        raise IntegrityError(f"{path}: has other tensors than were written; export it again")
    for stored, tensor in zip(reader.tensors, tensors, strict=True):
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        if stored.tensor_type != tensor.kind or values.shape != tensor.values.shape or _is_far(values, tensor):
            raise IntegrityError(f"{path}: {tensor.name} reads back differently; export it again")


def _is_far(values: Array, tensor: GGUFTensor) -> bool:
    """Whether a number differs by more than the rounding of its type."""
    error = np.abs(values - tensor.values)
    if tensor.kind == gguf.GGMLQuantizationType.F32:
        return bool(error.any())
    if tensor.kind == gguf.GGMLQuantizationType.F16:
        return bool((error > np.abs(tensor.values) * 2**-11 + 2**-25).any())
    blocks = np.abs(tensor.values).reshape(-1, BLOCK)
    step = blocks.max(axis=1, keepdims=True) / 127  # of which the scale, a float16, may be off by 2^-11
    return bool((error.reshape(-1, BLOCK) > step * (0.5 + 127 * 2**-11) + 2**-24 * 127).any())

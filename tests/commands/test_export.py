"""`gptpipe export`: GGUF files, read back, and run by llama.cpp itself where llama-cpp-python is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiktoken
import tiny
import torch

from gptpipe.base.manifest import new_folder
from gptpipe.commands import export as export_module
from gptpipe.commands import gguf_file
from gptpipe.commands.cli import _dispatch
from gptpipe.commands.gguf_card import card_fields
from gptpipe.commands.gguf_file import GGUFTensor, gguf_tensors, pattern_name, write_gguf
from gptpipe.commands.llama_cpp_runner import Answer, Request
from gptpipe.evaluate.difficult_text import difficult_texts
from gptpipe.formats.tokenizer import GPT4_PATTERN, GPT4O_PATTERN, PATTERN, PATTERNS, Tokenizer
from gptpipe.model.generate import Sampling, generate
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import save_model
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError
from gptpipe.tokenize.tokenizers import named_tokenizer, train_tokenizer

F32, F16, Q8_0 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "Q8_0"))
every_architecture = pytest.mark.parametrize(
    "switches", tiny.SWITCHES, ids=lambda s: "-".join(map(str, s.values()))
)
runs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python, which is built from source"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Trained on the difficult texts, so that merges show where pieces end."""
    return train_tokenizer([*difficult_texts()], 700)


def tokenizer_with(pattern: str) -> Tokenizer:
    """Every pair of bytes whose second is a multiple of four is a token."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i, j]): 256 + 64 * i + j // 4 for i in range(256) for j in range(0, 256, 4)}
    special = {"<|endoftext|>": len(ranks)}
    return Tokenizer(tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def network(tokenizer: Tokenizer, **changes: Any) -> GPT:
    return tiny.network(tokenizer.vocab_size, **{"context_length": 64, **changes})


CARD = """\
---
tags: [gptpipe]
training_data: [{name: "text a|b.txt", license: CC0-1.0}]
---
# gpt

A model.

- Network
"""


def save(folder: Path, model: GPT, tokenizer: Tokenizer, card: str | None = None) -> Path:
    with new_folder(folder, {}) as new:
        if card is not None:
            (new.path / "README.md").write_text(card)
        weights = dict(model.named_parameters())
        save_model(new.path, model.params, tokenizer.vocab_size, tokenizer.end_of_text, weights)
        tokenizer.save(new.path)
    return folder


def tensors_in(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_names_shapes_and_numbers_of_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Expected values are those of the specification and of llama.cpp's loader."""
    model = network(tokenizer, tie_embeddings=False, rope_theta=5000.0)
    write_gguf(tmp_path / "x.gguf", model, tokenizer, "q8_0")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")

    def value(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    assert value("general.architecture") == "qwen3"
    sizes = [value(f"qwen3.{key}") for key in ("context_length", "embedding_length", "block_count")]
    assert sizes == [64, 32, 2]
    heads = [value(f"qwen3.attention.{key}") for key in ("head_count", "head_count_kv", "key_length")]
    assert heads == [4, 2, 8]
    assert value("qwen3.rope.freq_base") == 5000.0
    assert value("tokenizer.ggml.pre") == "qwen35"
    assert value("tokenizer.ggml.tokens")[699] == "<|endoftext|>"
    assert value("tokenizer.ggml.token_type")[699] == 3  # control
    assert value("tokenizer.ggml.eos_token_id") == 699
    assert value("tokenizer.ggml.add_bos_token") is False
    tensors = tensors_in(tmp_path / "x.gguf")
    assert len(tensors) == 3 + 2 * 11
    assert tensors["token_embd.weight"].shape.tolist() == [32, 700]  # GGUF lists the inner dimension first
    assert tensors["blk.1.attn_k.weight"].shape.tolist() == [32, 16]
    kinds = {name: tensor.tensor_type for name, tensor in tensors.items()}
    assert kinds["output.weight"] == kinds["blk.0.ffn_up.weight"] == Q8_0
    assert kinds["blk.0.ffn_down.weight"] == F16  # 48 numbers in a row are no multiple of 32
    assert kinds["blk.0.attn_q_norm.weight"] == kinds["output_norm.weight"] == F32


def test_llama_rotates_neighbouring_pairs(tokenizer: Tokenizer) -> None:
    """Of a head's 8 rows, llama.cpp's row 2i is our row i, and its row 2i + 1 our row i + 4."""
    model = network(tokenizer, architecture="llama")
    ours = model.get_parameter("blocks.0.attention.qkv_proj.weight").detach().numpy()
    tensors = {tensor.name: tensor.values for tensor in gguf_tensors(model, "f32")}
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"][8:16], ours[8:16][order])
    np.testing.assert_array_equal(tensors["blk.0.attn_k.weight"][:8], ours[32:40][order])
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"], ours[48:64])


@pytest.mark.parametrize("number_type", ["f32", "f16", "q8_0"])
def test_a_file_that_reads_back_differently_does_not_appear(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, number_type: Any
) -> None:
    """A twentieth of one weight is more than rounding."""
    encode = gguf_file.encode

    def damaged(tensor: GGUFTensor) -> Any:
        values = tensor.values.copy()
        values.flat[0] += 0.05 * np.abs(values).max()
        return encode(GGUFTensor(tensor.name, values, tensor.kind))

    monkeypatch.setattr(gguf_file, "encode", damaged)
    with pytest.raises(IntegrityError, match=r"token_embd\.weight reads back differently"):
        write_gguf(tmp_path / "x.gguf", network(tokenizer), tokenizer, number_type)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_beyond_float16_is_an_input_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = network(tokenizer)
    with torch.no_grad():
        model.get_parameter("blocks.0.attention.o_proj.weight")[0, 0] = 1e5
    with pytest.raises(InputError, match=r"blk\.0\.attn_output\.weight: a weight is beyond .* use --type f32"):
        write_gguf(tmp_path / "x.gguf", model, tokenizer, "f16")
    assert list(tmp_path.iterdir()) == []


def test_each_pattern_has_its_name_or_is_refused(tmp_path: Path) -> None:
    names = {PATTERN: "qwen35", PATTERNS[2]: "gpt-2", GPT4_PATTERN: "llama-bpe", GPT4O_PATTERN: "gpt-4o"}
    for pattern in PATTERNS:
        if pattern in names:
            assert pattern_name(tokenizer_with(pattern)) == names[pattern]
        else:
            with pytest.raises(InputError, match=r"by a pattern that llama\.cpp does not know"):
                pattern_name(tokenizer_with(pattern))


def test_an_unused_id_has_a_token_that_no_text_can_spell(tmp_path: Path) -> None:
    """As in cl100k_base."""
    ranks = {bytes([i]): i for i in range(256)}
    special = {"<|endoftext|>": 258}
    gap = Tokenizer(tiktoken.Encoding("gap", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special))
    write_gguf(tmp_path / "x.gguf", network(gap), gap, "f32")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert tokens is not None
    assert kinds is not None
    assert tokens.contents()[255:] == ["ÿ", "unused 256", "unused 257", "<|endoftext|>"]
    assert kinds.contents()[255:] == [1, 5, 5, 3]


def test_the_command_writes_beside_the_model_and_says_how_to_run_it(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_module, "is_installed", lambda: False)
    folder = save(tmp_path / "my gpt", network(tokenizer), tokenizer)
    _dispatch(["export", "--type", "q8_0", "--model", str(folder)])
    printed = capsys.readouterr()
    out = tmp_path / "my gpt-q8_0.gguf"
    assert out.exists()
    assert f"llama-completion -m '{out}' -no-cnv -c 64 -p" in printed.out
    assert f"FROM {out}" in printed.out
    assert "ollama create gpt -f Modelfile" in printed.out
    assert printed.err.strip().startswith("warning: llama.cpp has not run the file")


def test_the_file_carries_the_card(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_module, "is_installed", lambda: True)
    monkeypatch.setattr(export_module, "compare_with_llama_cpp", lambda *_: "")
    trained = "".join(line for line in CARD.splitlines(keepends=True) if not line.startswith("training"))
    folder = save(tmp_path / "models/gpt", network(tokenizer), tokenizer, card=trained)
    _dispatch(["export", "--model", str(folder)])
    assert capsys.readouterr().err.startswith("warning: the file does not name the training data: ")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/model_card.md").write_text(CARD)
    _dispatch(["export", "--model", str(folder)])
    assert capsys.readouterr().err == ""
    reader = gguf.GGUFReader(tmp_path / "models/gpt-f16.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("general.")}
    n_thousands = round(network(tokenizer).n_parameters() / 1000)
    assert fields == fields | {
        "general.name": "gpt",
        "general.description": "A model.",
        "general.size_label": f"{n_thousands}K",
        "general.tags": ["gptpipe", "text-generation"],
        "general.license.name": "of the training data: CC0-1.0",
        "general.dataset.count": 1,
        "general.dataset.0.name": "text a|b.txt",
        "general.dataset.0.description": "licence: CC0-1.0",
    }


@pytest.mark.parametrize(
    "readme",
    [
        "# A model from elsewhere\n",
        "---\ntags: 5\n---\n# gpt\n",
        "---\ntraining_data: [1]\n---\n# gpt\n",
        "---\n- list\n---\n# gpt\n",
        "---\ntags: [\n---\n# gpt\n",
        "---\ntags: !!python/name:os.system\n---\n# gpt\n",
        f"---\ntags: {'[' * 1000}{']' * 1000}\n---\n# gpt\n",
        f"---\ntags: [{'a, ' * 30_000}]\n---\n# gpt\n",
    ],
)
def test_a_card_that_gptpipe_has_not_written_gives_no_keys(tmp_path: Path, readme: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert card_fields(tmp_path) == {}


def test_wrong_use_is_one_line(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "gpt", network(tokenizer), tokenizer)
    with pytest.raises(ConfigError, match=r"--out .* is a folder; name a file, such as"):
        _dispatch(["export", "--model", str(folder), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        _dispatch(["export", "--model", str(folder), "--type", "q2_k"])
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(IntegrityError):
        _dispatch(["export", "--model", str(folder)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs `gguf`: pip install .*\[gguf\]"):
        _dispatch(["export", "--model", str(folder)])


def our_answer(request: Request, model: GPT, tokenizer: Tokenizer) -> Answer:
    """What a llama.cpp without any difference would answer."""
    with torch.no_grad():
        logits = model(torch.tensor([list(request.tokens)]))[0].numpy()
    prompt = list(request.tokens[: request.n_prompt])
    steps = generate(model, [prompt], request.n_new, Sampling(temperature=0))
    continuation = [token for (token,) in steps]
    return Answer([tokenizer.encode(text) for text in request.texts], logits, continuation)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("ids", "llama.cpp gives other tokens for ' '"),
        ("logits", "llama.cpp computes a loss of"),
        ("continuation", "llama.cpp continues a prompt differently from token 3 on"),
    ],
)
def test_a_difference_to_llama_cpp_is_an_integrity_error(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, part: str, words: str
) -> None:
    model = network(tokenizer)

    def answer(request: Request) -> Answer:
        answer = our_answer(request, model, tokenizer)
        if part == "ids":
            answer.ids[0] = [1]
        elif part == "logits":
            answer.logits[:] = answer.logits[:, ::-1].copy()
        elif part == "continuation":
            answer.continuation[2] += 1 if answer.continuation[2] == 0 else -1
        return answer

    monkeypatch.setattr(export_module, "run_llama_cpp", answer)
    with pytest.raises(IntegrityError) as caught:
        export_module.compare_with_llama_cpp(tmp_path / "x.gguf", model, tokenizer, "f32")
    assert words in str(caught.value)
    assert str(tmp_path / "x.gguf") in str(caught.value)


@runs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("number_type", ["f32", "f16", "q8_0"])
@every_architecture
def test_llama_cpp_computes_the_same(
    tmp_path: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    switches: dict[str, Any],
    number_type: str,
) -> None:
    """The command itself compares ids, loss and greedy text, and fails for a difference."""
    folder = save(tmp_path / "gpt", network(tokenizer, **switches), tokenizer)
    _dispatch(["export", "--format", "gguf", "--type", number_type, "--model", str(folder)])
    printed = capsys.readouterr()
    assert "llama-cpp-python 0.3.36: the same token ids, loss" in printed.out
    assert printed.err == ""


@runs_llama_cpp
@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_gpt2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = named_tokenizer("gpt2")
    folder = save(tmp_path / "gpt", network(gpt2), gpt2)
    _dispatch(["export", "--type", "f16", "--model", str(folder)])
    assert ": the same token ids, loss" in capsys.readouterr().out


@runs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("pattern", [GPT4_PATTERN, GPT4O_PATTERN], ids=["gpt-4", "gpt-4o"])
def test_an_approximated_pattern_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    pairs = tokenizer_with(pattern)
    folder = save(tmp_path / "gpt", network(pairs), pairs)
    _dispatch(["export", "--type", "f32", "--model", str(folder)])
    printed = capsys.readouterr()
    assert "nats per token" in printed.out
    assert "warning: llama.cpp approximates the pattern of pairs: it may give other tokens for" in printed.err


@runs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("change", ["rope", "order"])
def test_llama_cpp_reveals_a_wrong_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = network(tokenizer, architecture="llama")
    folder = save(tmp_path / "gpt", model, tokenizer)
    if change == "rope":
        configuration = gguf_file._configuration
        monkeypatch.setattr(
            gguf_file, "_configuration", lambda *a: {**configuration(*a), "llama.rope.freq_base": 1.5}
        )
    else:
        monkeypatch.setattr(gguf_file, "_as_llama_cpp", lambda _, value, __: value.contiguous())
    with pytest.raises(IntegrityError, match=r"llama\.cpp (computes a loss|continues)"):
        _dispatch(["export", "--type", "f32", "--model", str(folder)])

"""The Hugging Face layout, written and read, compared with `transformers`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptpipe.base.manifest import new_folder
from gptpipe.formats.hf_tokenizer import save_tokenizer_json
from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.model import hf_weights
from gptpipe.model.generate import Sampling, generate
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_config import params_of, with_shape_of
from gptpipe.model.hf_weights import initialise_from, load_model, save_model
from gptpipe.score.scoring import Scoring, score
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, ResourceError
from gptpipe.tokenize.tokenizers import train_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

every_architecture = pytest.mark.parametrize(
    "switches", tiny.SWITCHES, ids=lambda s: "-".join(map(str, s.values()))
)

TEXT = (
    "the cat sees the dog in the café, it's 1234 o'clock… 猫\n\n"
    "naïve   spaces\tand\r\ncarriage <|endoftext|> returns "
)


def saved(folder: Path, model: GPT, end_of_text: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    weights = dict(sorted(model.named_parameters()))  # sorted, as in a checkpoint
    save_model(folder, model.params, model.vocab_size, end_of_text, weights)
    return folder


def read_by_transformers(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {
        name: list(keys) for name, keys in info.items() if keys
    } == {}  # no tensor is missing, left over or of another shape
    return model.eval()


def assert_same_logits(ours: GPT, theirs: Any) -> None:
    tokens = tiny.token_ids(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs.eval()(tokens).logits, atol=1e-4, rtol=1e-4)


@every_architecture
def test_transformers_reads_what_we_save(tmp_path: Path, switches: dict[str, Any]) -> None:
    model = tiny.network(**switches)
    theirs = read_by_transformers(saved(tmp_path, model))
    assert_same_logits(model, theirs)
    prompt = tiny.token_ids(2, 4)
    generated = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    ours = torch.tensor(list(generate(model, prompt.tolist(), 12, Sampling(temperature=0)))).T
    assert ours.tolist() == generated[:, 4:].tolist()


def test_the_repetition_penalty_is_that_of_transformers(tmp_path: Path) -> None:
    model = tiny.network()
    prompt = tiny.token_ids(2, 4)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    theirs = read_by_transformers(saved(tmp_path, model)).generate(prompt, repetition_penalty=1.5, **options)
    sampling = Sampling(temperature=0, repetition_penalty=1.5)
    ours = torch.tensor(list(generate(model, prompt.tolist(), 12, sampling))).T
    assert ours.tolist() == theirs[:, 4:].tolist()
    without = torch.tensor(list(generate(model, prompt.tolist(), 12, Sampling(temperature=0)))).T
    assert ours.tolist() != without.tolist()


@every_architecture
def test_we_read_what_we_save(tmp_path: Path, switches: dict[str, Any]) -> None:
    model = tiny.network(**switches)
    again = load_model(saved(tmp_path, model))
    assert again.params == model.params.model_copy(update={"head_dim": again.params.head_dim})
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_rope_theta_is_where_each_version_of_transformers_reads_it(tmp_path: Path) -> None:
    """Version 4 reads the key itself, and without it assumes 10,000; version 5 reads it in rope_parameters."""
    config = json.loads((saved(tmp_path, tiny.network(rope_theta=500.0)) / "config.json").read_bytes())
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (500.0, 500.0)


@pytest.mark.parametrize("switches", [tiny.SWITCHES[0], tiny.SWITCHES[3]], ids=lambda s: str(s["architecture"]))
def test_transformers_gives_the_same_loss_on_a_stream(tmp_path: Path, switches: dict[str, Any]) -> None:
    """The definition of the loss: every token but the first, in consecutive windows of the stream, in nats."""
    split = tiny.make_split(tmp_path)
    stream = open_stream(split, "val")
    vocab_size = 300
    model = tiny.network(vocab_size, **switches)
    nats, _, n_tokens = score(model, stream).by_document
    theirs = read_by_transformers(saved(tmp_path / "model", model))
    tokens = torch.from_numpy(np.load(split / "val" / "tokens.npy").astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert n_tokens.sum() == len(tokens) - 1
    assert nats.sum() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("switches", [tiny.SWITCHES[0], tiny.SWITCHES[3]], ids=lambda s: str(s["architecture"]))
def test_transformers_gives_the_same_loss_with_the_mask_of_documents(
    tmp_path: Path, switches: dict[str, Any]
) -> None:
    """How to score a model that was trained with `document_masking` outside of gptpipe."""
    stream = open_stream(tiny.make_split(tmp_path), "val")
    end = Tokenizer.load(tmp_path / "split" / TOKENIZER).end_of_text
    model = tiny.network(300, **switches)
    nats, _, _ = score(model, stream, Scoring(end_of_text=end)).by_document
    theirs = read_by_transformers(saved(tmp_path / "model", model))
    tokens = torch.from_numpy(stream.tokens.astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        n = len(window) - 1
        document = torch.cat((torch.zeros(1), (window[: n - 1] == end).cumsum(0)))
        may_attend = (document[:, None] == document[None, :]) & torch.ones(n, n).tril().bool()
        mask = torch.zeros(n, n).masked_fill(~may_attend, -torch.inf)[None, None]  # added to attention scores
        with torch.no_grad():
            logits = theirs(window[None, :-1], attention_mask=mask).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert nats.sum() == pytest.approx(total, rel=1e-5)


def small_tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20, "some more words to merge, other letters: xyz " * 20], 330)


def test_auto_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    saved(tmp_path, tiny.network(tokenizer.vocab_size), tokenizer.end_of_text)
    save_tokenizer_json(tmp_path, tokenizer, 16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = TEXT.replace("<|endoftext|>", "")
    for text in (
        plain,
        " leading",
        "trailing ",
        "\n\n\n",
        "  \n x",
        "don't 12345 ABC'S",
        "日本語 emoji 🙂",
        "",
    ):
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.end_of_text
    assert theirs.model_max_length == 16


_COMMON = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
MODERN = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def random_model(model_type: str, values: dict[str, Any]) -> Any:
    """A model of transformers; the library's classes are slow to import, so parameters of tests name them."""
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("gpt2", GPT2),
        ("llama", MODERN),
        ("llama", {**MODERN, "tie_word_embeddings": True}),
        ("qwen3", {**MODERN, "head_dim": 16}),
        ("qwen3", {**MODERN, "head_dim": 8, "tie_word_embeddings": True}),
    ],
    ids=["gpt2", "llama", "llama-tied", "qwen3", "qwen3-tied"],
)
def test_we_read_what_transformers_saves(
    tmp_path: Path, model_type: str, values: dict[str, Any], shard_size: str
) -> None:
    theirs = random_model(model_type, values)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() is (shard_size == "10KB")
    model = load_model(tmp_path)
    assert_same_logits(model, theirs)
    fresh = GPT(model.params, 50)
    initialise_from(fresh, tmp_path)
    assert_same_logits(fresh, theirs)


def gpt2_without_prefix(folder: Path) -> Any:
    """Like OpenAI's own upload of GPT-2: without `transformer.`, and with buffers besides the weights."""
    theirs = random_model("gpt2", GPT2)
    theirs.save_pretrained(folder)
    weights = {
        name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()
    }
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(weights, folder / "model.safetensors")
    return theirs


def test_gpt2_without_the_prefix(tmp_path: Path) -> None:
    theirs = gpt2_without_prefix(tmp_path)
    assert_same_logits(load_model(tmp_path), theirs)


def test_learned_positions_can_be_cut_off_but_not_added(tmp_path: Path) -> None:
    gpt2_without_prefix(tmp_path)
    whole = load_model(tmp_path)
    shorter = GPT(whole.params.model_copy(update={"context_length": 8}), 50)
    initialise_from(shorter, tmp_path)
    tokens = tiny.token_ids(1, 8)
    torch.testing.assert_close(shorter.eval()(tokens), whole.eval()(tokens))
    longer = GPT(whole.params.model_copy(update={"context_length": 32}), 50)
    with pytest.raises(ConfigError, match=r"model\.context_length is 32, the folder has 16"):
        initialise_from(longer, tmp_path)


def test_a_rotary_model_can_start_with_another_context_length(tmp_path: Path) -> None:
    model = tiny.network()
    saved(tmp_path, model)
    longer = GPT(model.params.model_copy(update={"context_length": 64, "dropout": 0.3}), 50)
    initialise_from(longer, tmp_path)
    assert_same_logits(longer, model_outputs(model))


def model_outputs(model: GPT) -> Any:
    """Our network with the calling convention of transformers."""

    class Outputs:
        def eval(self) -> Any:
            return self

        def __call__(self, tokens: Tensor) -> Any:
            return type("Logits", (), {"logits": model(tokens)})

    return Outputs()


def test_all_differences_to_the_folder_are_reported_at_once(tmp_path: Path) -> None:
    saved(tmp_path, tiny.network())
    other = tiny.network(60, n_embd=64, n_layer=3, head_dim=8, tie_embeddings=False)
    with pytest.raises(ConfigError) as caught:
        initialise_from(other, tmp_path)
    for part in (
        "n_layer is 3, the folder has 2",
        "n_embd is 64, the folder has 32",
        "60 entries, the folder has 50",
        "tie_embeddings is False, the folder has True",
    ):
        assert part in str(caught.value)
    assert "head_dim" not in str(caught.value)  # 8 is the folder's 32 / 4
    assert "\n" not in str(caught.value)


def test_the_shape_of_a_folder_replaces_all_but_context_length_and_dropout(tmp_path: Path) -> None:
    saved(tmp_path, tiny.network(context_length=16))
    present = tiny.model_params(
        architecture="llama", n_layer=5, n_embd=64, n_inner=8, context_length=8, dropout=0.5
    )
    shape = with_shape_of(present, tmp_path)
    assert shape == tiny.model_params(context_length=8, dropout=0.5, head_dim=8)
    model = GPT(shape, 50)
    initialise_from(model, tmp_path)
    assert torch.equal(model.embedding.weight, tiny.network().embedding.weight)


def test_another_head_dim_is_reported(tmp_path: Path) -> None:
    saved(tmp_path, tiny.network())
    with pytest.raises(ConfigError, match=r"model\.head_dim is 16, the folder has 8"):
        initialise_from(tiny.network(head_dim=16), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is none of gpt2, llama, qwen3"),
        ({"model_type": ["gpt2"]}, "is none of"),
        ({"hidden_act": "relu"}, "not supported: hidden_act 'relu'"),
        ({"attention_bias": True, "use_sliding_window": True}, "attention_bias True, use_sliding_window True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type 'yarn'"),
        ({"rope_parameters": 3}, "not a usable configuration"),
        ({"num_attention_heads": 3}, "must divide n_head 3"),
        ({"hidden_size": None}, "not a usable configuration"),
        ({"vocab_size": "many"}, "has no vocab_size"),
    ],
)
def test_an_unsupported_configuration_is_an_input_error(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    saved(tmp_path, tiny.network())
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("switches", [tiny.SWITCHES[0], tiny.SWITCHES[2], tiny.SWITCHES[3]], ids=str)
def test_missing_keys_have_the_defaults_of_transformers(tmp_path: Path, switches: dict[str, Any]) -> None:
    saved(tmp_path, tiny.network(**switches))
    config = json.loads((tmp_path / "config.json").read_bytes())
    for key in ("tie_word_embeddings", "attention_dropout", "attention_bias", "n_inner", "rope_parameters"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = params_of(config, tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.tie_embeddings is theirs.tie_word_embeddings
    if ours.architecture == "gpt2":
        assert (ours.n_inner, theirs.n_inner) == (128, None)  # 4 times n_embd
    else:
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_missing_or_damaged_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: not readable"):
        load_model(tmp_path / "nowhere")
    folder = saved(tmp_path / "model", tiny.network())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-7])
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: not there"):
        load_model(folder)


@pytest.mark.parametrize("index", ["{}", "[]", "no json", '{"weight_map": {"x": "model-9.safetensors"}}'])
def test_a_damaged_index_is_an_input_error(tmp_path: Path, index: str) -> None:
    saved(tmp_path, tiny.network())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError):
        load_model(tmp_path)


def test_a_link_out_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    """For weights and for the configuration. A link inside the folder is followed."""
    sound = saved(tmp_path / "sound", tiny.network())
    for name in ("model.safetensors", "config.json"):
        folder = saved(tmp_path / f"links {name}", tiny.network())
        (folder / name).rename(folder / f"real.{name}")
        (folder / name).symlink_to(f"real.{name}")
        load_model(folder)
        (folder / name).unlink()
        (folder / name).symlink_to(sound / name)
        with pytest.raises(InputError, match=f"{name}: a link out of the folder"):
            load_model(folder)


def test_a_folder_of_the_hugging_face_cache_is_loaded(tmp_path: Path) -> None:
    """Its files are links to blobs in a neighbouring folder."""
    model = tiny.network()
    real, cache = saved(tmp_path / "real", model), tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123456789abcdef"
    for folder in (snapshot, cache / "blobs"):
        folder.mkdir(parents=True)
    for path in real.iterdir():
        path.rename(cache / "blobs" / f"digest-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/digest-{path.name}")
    for name, parameter in load_model(snapshot).named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_folder_with_a_manifest_may_consist_of_links(tmp_path: Path) -> None:
    """DVC creates links with cache.type symlink; the manifest pins their content."""
    real = tiny.make_model(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for path in real.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    load_model(tmp_path / "links")


def test_a_model_that_does_not_fit_in_memory_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is 4 bytes of each weight, and twice the tables of rotary positions."""
    model = tiny.network(50)
    saved(tmp_path, model)
    needed = 4 * model.n_parameters() + 2 * 2 * 16 * 8 * 4  # two tables of 16 positions and 8 numbers
    monkeypatch.setattr(hf_weights, "available_memory", lambda _: needed)
    load_model(tmp_path)
    monkeypatch.setattr(hf_weights, "available_memory", lambda _: needed - 1)
    monkeypatch.setattr(hf_weights, "_copy_weights", lambda *_: pytest.fail("too late"))
    with pytest.raises(ResourceError, match="are available; choose a smaller model"):
        load_model(tmp_path)


def test_a_failed_allocation_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, tiny.network())
    monkeypatch.setattr(hf_weights, "load_file", lambda _: torch.empty(1 << 60))
    with pytest.raises(ResourceError, match="out of memory"):
        load_model(tmp_path)


def test_stored_tensors_that_are_not_weights_are_ignored(tmp_path: Path) -> None:
    """Older versions of transformers stored them, and the head of a tied model."""
    model = tiny.network()
    saved(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_logits(load_model(tmp_path), model_outputs(model))


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_weights_that_do_not_fit_the_network_are_an_integrity_error(tmp_path: Path, change: str) -> None:
    saved(tmp_path, tiny.network())
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    value = weights.pop(name)
    if change == "misshapen":
        weights[name] = value[:-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match="up_proj"):
        load_model(tmp_path)


def test_a_folder_with_a_manifest_is_verified_before_training_starts_from_it(tmp_path: Path) -> None:
    """safetensors does not notice a flipped bit."""
    model = tiny.network()
    with new_folder(tmp_path / "model", {}) as folder:
        saved(folder.path, model)
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        initialise_from(model, tmp_path / "model")

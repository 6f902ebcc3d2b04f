"""Small real things that tests of the model's side share: parameters, a network, a split of made-up text."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sections import SHIPPED

from gptpipe.base.manifest import FileEntry, Manifest, new_folder
from gptpipe.collect.collect import collect
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import save_model
from gptpipe.model.params import ModelParams
from gptpipe.params import Params
from gptpipe.split.split import split
from gptpipe.tokenize.encode import tokenize
from gptpipe.tokenize.tokenizers import train_tokenizer
from gptpipe.train.batches import Batches
from gptpipe.train.optim import build_optimizers
from gptpipe.train.state import TrainState
from gptpipe.train.step import Plan, optimizer_step

MODEL: dict[str, Any] = {
    "architecture": "qwen3",
    "context_length": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "head_dim": None,
    "n_inner": 48,
    "dropout": 0.0,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
    "tie_embeddings": True,
}
TRAIN: dict[str, Any] = {
    "init_from": None,
    "continue_from": None,
    "launcher": "python",
    "parallel": "ddp",
    "optimizer": "adamw",
    "lr": 3e-3,
    "embedding_lr_scale": 15.0,
    "head_lr_scale": 0.5,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "z_loss": 0.0,
    "on_spike": "stop",
    "spike_sigmas": None,
    "schedule": "cosine",
    "warmup_steps": 2,
    "decay_fraction": 0.4,
    "final_lr_fraction": 0.1,
    "batch_size": 4,
    "micro_batch_size": None,
    "stride": 8,
    "document_masking": False,
    "epochs": None,
    "max_steps": 12,
    "eval_every": 4,
    "save_every": 3,
    "keep_state": True,
    "patience": None,
    "activation_checkpointing": False,
    "sample_prompts": ("the ",),
    "sample_tokens": 4,
    "device": "cpu",
    "precision": "float32",
    "compile": False,
}
EVALUATE: dict[str, Any] = {
    "prompts": ("the ",),
    "max_new_tokens": 8,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 1.0,
    "continuation_documents": 3,
    "continuation_tokens": 4,
    "check_transformers": False,  # importing transformers takes 7 seconds
    "tasks": (),
    "task_folder": "data/tasks",
}
WORDS = (
    "the",
    "a",
    "red",
    "blue",
    "old",
    "cat",
    "dog",
    "tree",
    "sees",
    "likes",
    "was",
    "near",
    "naïve",
    "café",
    "and",
)
SWITCHES: list[dict[str, Any]] = [
    {"architecture": "gpt2", "n_kv_head": 4, "norm_eps": 1e-5},
    {"architecture": "llama", "n_kv_head": 4},
    {"architecture": "llama", "tie_embeddings": False, "n_kv_head": 1, "rope_theta": 500.0},
    {"architecture": "qwen3", "tie_embeddings": False},
    {"architecture": "qwen3", "head_dim": 16},
]


def model_params(**changes: Any) -> ModelParams:
    return ModelParams(**{**MODEL, **changes})


def params(texts: tuple[str, ...] = ("none.txt",), **changes: Any) -> Params:
    """All parameters; `changes` by dotted name with `__` for the dot, such as train__lr."""
    tree: dict[str, Any] = {
        "seed": 7,
        "collect": {
            "sources": tuple({"kind": "text", "paths": (text,), "document": "line"} for text in texts),
            "encoding_errors": "strict",
            "min_document_bytes": 1,
            "max_document_bytes": 100_000,
            "max_expansion": 200,
            "dedup": "exact",
            "filters": dict(SHIPPED.collect.filters),
            "near_similarity": 0.7,
        },
        "tokenize": {**dict(SHIPPED.tokenize), "vocab_size": 300},
        "split": {**dict(SHIPPED.split), "val_fraction": 0.2, "test_fraction": 0.2},
        "model": dict(MODEL),
        "train": dict(TRAIN),
        "evaluate": dict(EVALUATE),
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree[section][key] = value
        else:
            tree[section] = value
    return Params(**tree)


def network(vocab_size: int = 50, seed: int = 0, **changes: Any) -> GPT:
    """A network whose every weight matters: none is zero, and no two norms are alike."""
    model = GPT(model_params(**changes), vocab_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return model.eval()


def trained_state(n_steps: int = 0, **changes: Any) -> tuple[TrainState, Batches, Plan]:
    """A state `n_steps` into a training on made-up tokens, ready to go on; `changes` as in params()."""
    p = params(**changes)
    torch.manual_seed(p.seed)
    model = GPT(p.model, 50)
    state = TrainState(model, build_optimizers(model, p.train), p.train.micro_batch_size or p.train.batch_size)
    tokens = np.random.default_rng(0).integers(50, size=500).astype(np.uint16)
    batches = Batches(tokens, context_length=16, stride=8, batch_size=p.train.batch_size, seed=p.seed)
    n_total = p.train.n_steps(batches.n_windows)
    plan = Plan(p.train, n_total, p.seed, torch.float32, model.loss)
    model.train()
    for _ in range(n_steps):
        optimizer_step(state, batches, plan)
    return state, batches, plan


def token_ids(*shape: int, vocab_size: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def make_split(folder: Path, n_documents: int = 90) -> Path:
    """Two sources of made-up sentences through the real collect, tokenize and split; returns its folder."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, size=int(rng.integers(6, 30)))) + "." for _ in range(n_documents)]
    texts = (folder / "one.txt", folder / "two.txt")
    for path, part in zip(texts, (lines[::3], lines[1::3] + lines[2::3]), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    p = params(tuple(map(str, texts)))
    collect(p.collect, folder / "raw")
    tokenize(folder / "raw", folder / "tokens", p.tokenize, p.split.fractions, p.seed)
    split(folder / "tokens", folder / "split", p.split, p.seed)
    return folder / "split"


def make_model(folder: Path, seed: int = 0) -> Path:
    """A model folder with a tokenizer of its own, untrained."""
    tokenizer = train_tokenizer(["the cat sat on the mat, the dog sat on the log"] * 3, 270)
    shape = model_params()
    with new_folder(folder, {}) as new:
        weights = dict(network(tokenizer.vocab_size, seed).named_parameters())
        save_model(new.path, shape, tokenizer.vocab_size, tokenizer.end_of_text, weights)
        tokenizer.save(new.path)
    return folder


# The manifest of a split, for tests that only write it down.
LINEAGE = Manifest(
    schema_version=2,
    made_from={"raw": "a" * 64, "tokens": "b" * 64},
    counts={
        f"{side}_{what}": 7 for side in ("train", "val", "test") for what in ("documents", "tokens", "bytes")
    },
    files={f"{side}/tokens.npy": FileEntry(sha256="c" * 64, n_bytes=1) for side in ("train", "val", "test")},
)

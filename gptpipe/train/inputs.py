"""What a training starts from: the verified split, its batches, and the runtime."""

from dataclasses import dataclass
from pathlib import Path

import torch

from gptpipe.base.manifest import Manifest
from gptpipe.formats.streams import Stream, open_stream, verify_split
from gptpipe.formats.tokenizer import TOKENIZER, Tokenizer
from gptpipe.model.device import keep_freed_memory
from gptpipe.model.gpt import GPT
from gptpipe.score.scoring import Scoring
from gptpipe.shell.errors import ConfigError, InputError
from gptpipe.train.batches import Batches
from gptpipe.train.params import RunParams
from gptpipe.train.runtime import Runtime, be_deterministic, resolve_runtime


@dataclass(frozen=True)
class Inputs:
    """Everything that is fixed before the first weights are drawn."""

    split: Manifest
    tokenizer: Tokenizer
    train: Stream
    val: Stream
    batches: Batches
    n_steps: int
    runtime: Runtime
    scoring: Scoring  # as trained: the same precision and the same mask


def load_inputs(params: RunParams, split: Path) -> Inputs:
    """Verify the split and choose the runtime. From here on torch computes deterministically.

    Raises IntegrityError, InputError for too few tokens, and ConfigError for values that do not fit the data or
    the machine.
    """
    section = params.train
    be_deterministic()
    keep_freed_memory()
    manifest = verify_split(split)
    tokenizer = Tokenizer.load(split / TOKENIZER)
    train = open_stream(split, "train", tokenizer.vocab_size)
    val = open_stream(split, "val", tokenizer.vocab_size)
    if len(val.tokens) < 2:
        raise InputError("train: the validation split is empty; raise split.val_fraction or add documents")
    batches = Batches(
        train.tokens,
        context_length=params.model.context_length,
        stride=section.stride,
        batch_size=section.batch_size,
        seed=params.seed,
    )
    n_steps = section.n_steps(batches.n_windows)
    if section.warmup_steps >= n_steps:
        raise ConfigError(
            f"train.warmup_steps {section.warmup_steps} must be below the {n_steps} steps of train.epochs"
        )
    with torch.device("meta"):
        flops_per_token = GPT(params.model, tokenizer.vocab_size).flops_per_token()
    flops = flops_per_token * n_steps * section.batch_size * params.model.context_length
    runtime = resolve_runtime(section, flops, params.model)
    scoring = Scoring(runtime.precision, tokenizer.end_of_text if section.document_masking else None)
    return Inputs(manifest, tokenizer, train, val, batches, n_steps, runtime, scoring)

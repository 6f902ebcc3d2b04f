"""Compare a model folder with the library `transformers`: the same token ids, logits and greedy text.

People load `models/gpt` with that library. If it computes something else there, the model is not registered.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptpipe.evaluate.difficult_text import difficult_texts
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.device import available_memory, memory_errors
from gptpipe.model.generate import Sampling, generate
from gptpipe.model.gpt import GPT
from gptpipe.shell.errors import IntegrityError, ResourceError, first_line

TOLERANCE = 1e-4  # of a logit: absolute, and relative to the largest one. float32 rounds to 1e-7.
_MAX_LOGITS = 1 << 24  # logits compared: 64 MB in float32
_PROMPT_TOKENS = 16
_NEW_TOKENS = 48


def is_installed() -> bool:
    """Whether this environment contains `transformers`. Does not import it, which takes seconds."""
    return importlib.util.find_spec("transformers") is not None


def check_with_transformers(
    folder: Path, model: GPT, tokenizer: Tokenizer, tokens: npt.NDArray[np.unsignedinteger]
) -> str:
    """Load `folder` with transformers and compare; returns a line that says what is equal.

    `tokens` are at least two tokens of text, on which logits are compared. Raises IntegrityError for the first
    difference, ResourceError if transformers cannot load the folder.
    """
    with memory_errors(lambda: f"{folder}: out of memory while transformers loads it; {_ADVICE}"):
        theirs, their_tokenizer, version = _load(folder, model)
        name = f"transformers {version}"
        _compare_ids(their_tokenizer, tokenizer, f"{folder}: {name}")
        difference = _compare_logits(theirs, model, tokens, f"{folder}: {name}")
        _compare_greedy(theirs, model, tokens, tokenizer.end_of_text, f"{folder}: {name}")
    return f"{name} gives the same token ids, logits (difference at most {difference:.1e}) and greedy text"


_ADVICE = "free memory, or set evaluate.check_transformers to false"


def _load(folder: Path, model: GPT) -> tuple[Any, Any, str]:
    """Network and tokenizer of the folder, loaded by transformers, and its version. Raises ResourceError."""
    device = model.embedding.weight.device
    needed = 4 * model.n_parameters()
    if needed > available_memory(device):
        raise ResourceError(
            f"{folder}: loading it a second time takes {needed / 2**30:.1f} GiB of memory; {_ADVICE}"
        )
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (ImportError, OSError, ValueError, LookupError, AttributeError) as error:
        raise ResourceError(
            f"{folder}: transformers cannot load it: {first_line(error)}; install version 4.57 or newer, "
            "or set evaluate.check_transformers to false"
        ) from error
    return theirs.float().to(device).eval(), their_tokenizer, transformers.__version__


def _compare_ids(their_tokenizer: Any, tokenizer: Tokenizer, name: str) -> None:
    """Raises IntegrityError if a text has other ids, or if their ids do not lead back to the text."""
    for text in difficult_texts():
        ids = their_tokenizer(text)["input_ids"]
        if ids != tokenizer.encode(text) or their_tokenizer.decode(ids) != text:
            raise IntegrityError(f"{name} gives other tokens for {text!r:.60}; do not use its tokenizer.json")


@torch.no_grad()
def _compare_logits(theirs: Any, model: GPT, tokens: npt.NDArray[np.unsignedinteger], name: str) -> float:
    """The largest difference between logits on the start of `tokens`. Raises IntegrityError."""
    n_tokens = min(model.params.context_length, max(2, _MAX_LOGITS // model.vocab_size))
    window = _tensor(tokens[:n_tokens], model)
    logits, their_logits = model.eval()(window), theirs(window).logits  # (1, T, V)
    difference: float = (logits - their_logits).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, logits.abs().max().item()):
        raise IntegrityError(
            f"{name} computes other logits, they differ by {difference:.2g}; do not use its config.json"
        )
    return difference


@torch.no_grad()
def _compare_greedy(
    theirs: Any, model: GPT, tokens: npt.NDArray[np.unsignedinteger], end_of_text: int, name: str
) -> None:
    """Raises IntegrityError if greedy continuations of `tokens` differ, but not by equally probable tokens."""
    n_prompt = min(_PROMPT_TOKENS, model.params.context_length - 1, len(tokens))
    n_new = min(_NEW_TOKENS, model.params.context_length - n_prompt)
    prompt = _tensor(tokens[:n_prompt], model)
    ours = [token for (token,) in generate(model, prompt.tolist(), n_new, Sampling(temperature=0))]
    generated = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=end_of_text,
    )
    their_tokens = generated[0, n_prompt:].tolist()
    equal = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, their_tokens, strict=True)))
    if len(equal) == n_new:
        return
    so_far = torch.cat((prompt[0], prompt.new_tensor([token for token, _ in equal])))[None]
    logits = model(so_far)[0, -1]
    candidates = logits[[ours[len(equal)], their_tokens[len(equal)]]]
    if (candidates[0] - candidates[1]).abs() > 2 * TOLERANCE * max(1.0, logits.abs().max().item()):
        raise IntegrityError(
            f"{name} continues a prompt differently from token {len(equal) + 1} on; do not use it"
        )


def _tensor(tokens: npt.NDArray[np.unsignedinteger], model: GPT) -> Tensor:
    """Token ids (1, T) on the device of the network."""
    return torch.from_numpy(tokens.astype(np.int64)).to(model.embedding.weight.device)[None]

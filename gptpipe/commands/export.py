"""`gptpipe export`: a model as one file for another program, compared with what that program computes."""

import argparse
import importlib.util
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from gptpipe.base.manifest import verify
from gptpipe.commands.gguf_card import card_fields
from gptpipe.commands.llama_cpp_runner import Answer, Request, is_installed, llama_cpp_version, run_llama_cpp
from gptpipe.evaluate.difficult_text import difficult_texts
from gptpipe.formats.tokenizer import GPT4_PATTERN, GPT4O_PATTERN, Tokenizer
from gptpipe.model.gpt import GPT
from gptpipe.score.continuations import load_generator
from gptpipe.shell.console import complain, printable
from gptpipe.shell.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    from gptpipe.commands.gguf_file import NumberType

_COMPARED_TOKENS = 512
_PROMPT_TOKENS = 8
_NEW_TOKENS = 48
# The largest difference between our loss and llama.cpp's in nats per token, and between logits as a share of
# the largest logit. llama.cpp multiplies float16 with float16, quantized numbers with quantized ones, and takes
# GELU from a table in float16.
_TOLERANCES: dict["NumberType", float] = {"f32": 0.002, "f16": 0.01, "q8_0": 0.1}
# What llama.cpp's own version of a pattern does differently.
_APPROXIMATED = {
    GPT4_PATTERN: "white space at the end of a text",
    GPT4O_PATTERN: "combining marks, and capital letters other than A to Z inside a word",
}


def export(options: argparse.Namespace) -> None:
    """Write the file, compare it with the model folder, and print how to run it.

    Raises ConfigError, InputError, IntegrityError for a damaged model folder or a file that computes something
    else, ResourceError.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("gptpipe export needs `gguf`: pip install -c constraints.txt -e '.[gguf]'")
    out = options.out or options.model.with_name(f"{options.model.resolve().name}-{options.type}.gguf")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file, such as {out / f'gpt-{options.type}.gguf'}")
    verify(options.model)
    model, tokenizer = load_generator(options.model)
    from gptpipe.commands.gguf_file import write_gguf  # late: the package may be missing

    card = card_fields(options.model)
    write_gguf(out, model, tokenizer, options.type, card)
    size = out.stat().st_size / 1e6
    summary = f"{out}: {size:,.1f} MB, {model.n_parameters():,} parameters; it reads back as it was written"
    print(printable(summary))
    if card and not any(key.startswith("general.dataset") for key in card):
        complain(
            "warning: the file does not name the training data: reports/model_card.md is missing or of another "
            "model; run `dvc repro evaluate`, and export again"
        )
    if is_installed():
        print(compare_with_llama_cpp(out, model, tokenizer, options.type))
    else:
        complain(
            "warning: llama.cpp has not run the file: `pip install llama-cpp-python`, and export again to check"
        )
    if tokenizer.pattern in _APPROXIMATED:
        complain(
            f"warning: llama.cpp approximates the pattern of {tokenizer.encoding.name}: "
            f"it may give other tokens for {_APPROXIMATED[tokenizer.pattern]}"
        )
    print(printable(_how_to_run(out, model.params.context_length)))


@torch.no_grad()
def compare_with_llama_cpp(path: Path, model: GPT, tokenizer: Tokenizer, number_type: "NumberType") -> str:
    """Run the file in llama.cpp; returns a line on what is equal. Raises IntegrityError for a difference."""
    texts = list(difficult_texts())
    expected = [tokenizer.encode(text) for text in texts]
    n_tokens = min(_COMPARED_TOKENS, model.params.context_length)
    tokens = tokenizer.encode("\n".join(texts))[:n_tokens]
    n_prompt = min(_PROMPT_TOKENS, n_tokens - 1)
    n_new = min(_NEW_TOKENS, n_tokens - n_prompt)
    answer = run_llama_cpp(Request(path, n_tokens, texts, tokens, n_prompt, n_new))

    n_other = sum(ids != expected_ids for ids, expected_ids in zip(answer.ids, expected, strict=True))
    if n_other and tokenizer.pattern not in _APPROXIMATED:
        first = next(text for text, *ids in zip(texts, answer.ids, expected, strict=True) if ids[0] != ids[1])
        raise IntegrityError(f"{path}: llama.cpp gives other tokens for {first!r:.60}; do not use the file")
    window = torch.tensor([tokens])
    logits = model.eval()(window)[0]  # (T, V)
    targets = window[0, 1:]
    loss = F.cross_entropy(logits[:-1], targets).item()
    their_loss = F.cross_entropy(torch.from_numpy(answer.logits)[:-1], targets).item()
    if not abs(their_loss - loss) <= _TOLERANCES[number_type]:
        raise IntegrityError(
            f"{path}: llama.cpp computes a loss of {their_loss:.4f} nats per token where ours is {loss:.4f}; "
            "do not use the file"
        )
    greedy = _compare_greedy(path, model, tokens[:n_prompt], answer, _TOLERANCES[number_type])
    same = (
        "the same token ids"
        if not n_other
        else f"other token ids for {n_other} of {len(texts)} difficult texts"
    )
    return (
        f"llama-cpp-python {llama_cpp_version()}: {same}, "
        f"loss {their_loss:.4f} (ours {loss:.4f}) nats per token, {greedy}"
    )


def _compare_greedy(path: Path, model: GPT, prompt: list[int], answer: Answer, tolerance: float) -> str:
    """Whether each token of llama.cpp's greedy text is also our most probable one, in words.

    Raises IntegrityError if its logit is below our largest by more than the rounding of the number type.
    """
    window = torch.tensor([[*prompt, *answer.continuation]])
    logits = model(window)[0, len(prompt) - 1 : -1]  # (T, V), of the tokens of the continuation
    chosen = logits.gather(-1, torch.tensor(answer.continuation)[:, None])[:, 0]
    lead = (logits.amax(dim=-1) - chosen) / logits.abs().amax()
    if (lead > tolerance).any():
        place = int((lead > tolerance).nonzero()[0]) + 1
        raise IntegrityError(
            f"{path}: llama.cpp continues a prompt differently from token {place} on; do not use it"
        )
    n_other = int((lead > 0).sum())
    return (
        "the same greedy text" if not n_other else f"{n_other} of {len(lead)} greedy tokens differ by rounding"
    )


def _how_to_run(path: Path, context_length: int) -> str:
    """Commands for a shell. The prompt is sent as it is, because the model knows no chat template."""
    file = shlex.quote(str(path))
    modelfile = shlex.quote(
        f"FROM {path.resolve()}\nTEMPLATE {{{{ .Prompt }}}}\nPARAMETER num_ctx {context_length}\n"
    )
    modelfile = modelfile.replace("\n", "\\n")
    return (
        "To run it in llama.cpp:\n"
        f"  llama-completion -m {file} -no-cnv -c {context_length} -p 'Once upon a time'\n"
        "To run it in ollama:\n"
        f"  printf {modelfile} > Modelfile && ollama create gpt -f Modelfile && "
        "ollama run gpt 'Once upon a time'"
    )

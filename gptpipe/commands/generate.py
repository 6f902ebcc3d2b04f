"""`gptpipe generate`: text from a trained model, for one prompt or interactively."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gptpipe.base.manifest import verify
from gptpipe.model.device import best_device, memory_errors
from gptpipe.model.generate import Sampling
from gptpipe.score.continuations import announce_cut, load_generator
from gptpipe.score.text_batch import continue_text
from gptpipe.shell.console import printable
from gptpipe.shell.errors import ConfigError, InputError

_NOT_UTF8 = "the prompt is not valid UTF-8; convert it"


def generate(options: argparse.Namespace) -> None:
    """Print the prompt and its continuation, or ask for prompts with `options.interactive`.

    Raises ConfigError, InputError, IntegrityError for a damaged model folder, ResourceError for too little
    memory.
    """
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}; set it to 1 or more")
    if "" in (options.stop or ()):
        raise ConfigError("--stop is empty; give a text that ends the continuation, or leave the option out")
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    generator = _Generator(options.model, options.max_new_tokens, sampling, options.stop or ())
    if options.interactive:
        _answer_prompts(generator)
    else:
        generator.answer(options.prompt)


class _Generator:
    """A loaded model that prints continuations."""

    def __init__(self, folder: Path, max_new_tokens: int, sampling: Sampling, stop: Sequence[str]) -> None:
        verify(folder)
        self._model, self._tokenizer = load_generator(folder)
        self._model.to(best_device())
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._stop = stop

    def answer(self, prompt: str) -> None:
        """Print the prompt and its continuation, piece by piece."""
        # How Python decodes bytes that are not UTF-8.
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(_NOT_UTF8)
        announce_cut(self._model, self._tokenizer, prompt, "the prompt")
        pieces = continue_text(
            self._model, self._tokenizer, prompt, self._max_new_tokens, self._sampling, self._stop
        )
        with memory_errors(lambda: "out of memory; shorten the prompt, or lower --max-new-tokens"):
            _print_piece(prompt)
            for piece in pieces:
                _print_piece(piece)
        print()


def _print_piece(text: str) -> None:
    """Print text without a line end. On a terminal, control characters are shown as escapes."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _answer_prompts(generator: _Generator) -> None:
    """Ask for prompts until an empty line or the end of the input. Ctrl-C ends one continuation only."""
    with suppress(ImportError):
        import readline  # noqa: F401  (once imported, `input` edits lines and keeps a history)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
            if not prompt:
                return
            generator.answer(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError as error:
            raise InputError(_NOT_UTF8) from error

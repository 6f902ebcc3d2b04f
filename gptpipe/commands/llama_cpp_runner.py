"""Run a GGUF file in llama.cpp, through the package llama-cpp-python, in a process that may crash."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptpipe.base.workers import Worker, WorkerDied
from gptpipe.shell.errors import IntegrityError

_F32 = 0  # ggml's number of the type of cached keys and values; the default is float16


@dataclass(frozen=True)
class Request:
    """What to compute with a file."""

    path: Path
    context_length: int
    texts: Sequence[str]
    tokens: Sequence[int]  # at most `context_length`
    n_prompt: int  # the first tokens, to be continued greedily
    n_new: int


@dataclass(frozen=True)
class Answer:
    """What llama.cpp computed."""

    ids: list[list[int]]  # of each text
    logits: npt.NDArray[np.float32]  # (T, V) of the tokens
    continuation: list[int]


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def llama_cpp_version() -> str:
    return version("llama-cpp-python")


def run_llama_cpp(request: Request) -> Answer:
    """The answer of llama.cpp. Raises IntegrityError if it cannot load the file, or ends the process."""
    worker = Worker(_answer)
    try:
        return worker.ask(request)
    except WorkerDied as death:
        raise IntegrityError(
            f"{request.path}: llama.cpp crashed while it ran the file (exit code {death.exit_code}); "
            "use another --type, or another version of llama-cpp-python"
        ) from None
    finally:
        worker.stop()
        worker.close()


def _answer(request: Request) -> Answer:
    """In the worker process."""
    from llama_cpp import Llama

    try:
        model = Llama(
            str(request.path),
            n_ctx=request.context_length,
            n_batch=request.context_length,
            n_ubatch=request.context_length,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=_F32,
            type_v=_F32,
            verbose=False,
        )
    except ValueError as error:  # what llama-cpp-python raises for a file that llama.cpp refuses
        raise IntegrityError(
            f"{request.path}: llama.cpp cannot load the file ({error}); export it again"
        ) from error
    ids = [
        model.tokenize(text.encode(), add_bos=False, special=False) if text else [] for text in request.texts
    ]
    model.eval(list(request.tokens))
    logits = model.scores[: len(request.tokens)].copy()
    model.reset()
    continuation: list[int] = []
    pending = list(request.tokens[: request.n_prompt])
    for _ in range(request.n_new):
        model.eval(pending)
        pending = [int(model.scores[model.n_tokens - 1].argmax())]
        continuation += pending
    return Answer(ids, logits, continuation)

"""What notebooks and other programs use: `import gptpipe`, and these names are in it.

docs/use-from-python.md has an example of each.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import pandas as pd

from gptpipe.base.manifest import Manifest, verify
from gptpipe.formats.sides import Side
from gptpipe.formats.streams import Stream, open_stream, verify_split
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.device import best_device
from gptpipe.model.generate import Sampling
from gptpipe.model.gpt import GPT
from gptpipe.record.starting_model import model_folder
from gptpipe.score.continuations import load_generator
from gptpipe.score.scoring import score, scoring_of
from gptpipe.score.text_batch import continue_text, continue_texts
from gptpipe.shell.errors import ConfigError, InputError
from gptpipe.train.batches import Batches as Batches


class Options(TypedDict, total=False):
    """How to continue a prompt. What is left out has the default of `gptpipe generate`."""

    max_new_tokens: int  # 200
    temperature: float  # 0.8; 0: always the most probable token
    top_k: int | None  # 50; None: all tokens
    top_p: float  # 1
    min_p: float  # 0
    repetition_penalty: float  # 1
    stop: Sequence[str]  # none; the text ends before the first of these strings
    seed: int  # 0


class Model:
    """A trained model with its tokenizer; `load_model` makes one."""

    def __init__(self, network: GPT, tokenizer: Tokenizer, folder: Path, manifest: Manifest) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self._folder, self._manifest = folder, manifest

    @property
    def context_length(self) -> int:
        return self.network.params.context_length

    def generate(self, prompts: str | Sequence[str], **options: Unpack[Options]) -> str | list[str]:
        """The continuation of a prompt, or of each in a list. A prompt gets the same text alone and in a list.

        The options and their defaults are in `Options`. Raises ConfigError for an option, InputError for a
        prompt.
        """
        listed = [prompts] if isinstance(prompts, str) else prompts
        texts = continue_texts(self.network, self.tokenizer, listed, *_arguments(options))
        return texts[0] if isinstance(prompts, str) else texts

    def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
        """The continuation of a prompt in pieces of whole characters. Options as for `generate`."""
        return continue_text(self.network, self.tokenizer, prompt, *_arguments(options))

    def score(self, text: str) -> dict[str, float]:
        """`loss` (mean nats per token), `perplexity` and `bits_per_byte` of a text, and its `n_tokens`.

        The text is scored as evaluate scores a held-out document that is alone in its split: after an
        end-of-text token, with its own at the end, in consecutive windows. Raises InputError for an empty text,
        IntegrityError if the folder does not say how the model was scored in training.
        """
        if not text:
            raise InputError("the text to score is empty")
        end = self.tokenizer.end_of_text
        tokens = np.array([end, *self.tokenizer.encode(text), end], dtype=self.tokenizer.dtype)
        documents = pd.DataFrame({"offset": [0, 1], "n_tokens": [1, len(tokens) - 1]})
        scoring = scoring_of(self._folder, self._manifest, end)
        nats, _, n_tokens = score(self.network, Stream(tokens, documents), scoring).by_document[:, 1]
        loss = float(nats / n_tokens)
        bits_per_byte = float(nats / math.log(2) / len(text.encode()))
        perplexity = math.exp(min(loss, 700.0))
        return {
            "loss": loss,
            "perplexity": perplexity,
            "bits_per_byte": bits_per_byte,
            "n_tokens": int(n_tokens),
        }

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD."""
        return self.tokenizer.decode(ids)


def _arguments(options: Options) -> tuple[int, Sampling, Sequence[str]]:
    """The last arguments of `continue_text`. Raises ConfigError."""
    sampling = {name: value for name, value in options.items() if name not in ("max_new_tokens", "stop")}
    known = Options.__annotations__
    for name in options:
        if name not in known:
            raise ConfigError(f"there is no option {name}, only {', '.join(known)}")
    n_tokens = options.get("max_new_tokens", 200)
    if n_tokens < 1:
        raise ConfigError(f"max_new_tokens is {n_tokens}; set it to 1 or more")
    defaults: dict[str, Any] = {"temperature": 0.8, "top_k": 50}
    return n_tokens, Sampling(**{**defaults, **sampling}), options.get("stop", ())


def load_model(model: str | Path = "models/gpt") -> Model:
    """A model folder, or a registered model such as `models:/gpt@champion`, on the fastest device.

    Raises ConfigError for a name that cannot be used, InputError, IntegrityError for a damaged folder,
    ResourceError.
    """
    is_registered = isinstance(model, str) and model.startswith("models:")
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder("load_model", model if is_registered else Path(model), Path(temporary))
        manifest = verify(folder)
        network, tokenizer = load_generator(folder)
        return Model(network.to(best_device()), tokenizer, folder, manifest)


def open_split(folder: str | Path = "data/split", side: Side = "train") -> Stream:
    """One side of a split, verified: `tokens` (a memory-mapped array) and `documents` (a data frame).

    Raises IntegrityError.
    """
    verify_split(Path(folder))
    return open_stream(Path(folder), side)


def read_curves(run: str | Path = Path("reports/mlflow_run.json")) -> pd.DataFrame:
    """The curves of a run: a row for each step, a column for each metric such as `train/loss`.

    `run` is a run id of MLflow, or a file that contains one. Raises InputError, IntegrityError, StoreError.
    """
    from gptpipe.record.curves import curves_of  # late: importing MLflow takes seconds

    return curves_of(run)

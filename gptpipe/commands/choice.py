"""Which training to propose: what each network can do within a budget, and how low its loss gets."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gptpipe.commands.loss_law import relative_loss, useful_repeats
from gptpipe.commands.probes import Timing
from gptpipe.params import Params

MIN_STEPS = 20
# Passes over the text after the first, in units of R (`loss_law.py`): after these, a training has learnt 86% of
# what repetitions can teach.
_MAX_REPEATS = 2.0
_N_VALIDATIONS = 5  # and one before the first step
_N_WORSE = 2  # after so many networks in a row that are worse than the best, larger ones are not tried
_HEAD_WIDTH = 64
# The best batch size grows with the 0.4th power of the tokens (Bergsma et al., 2025, arXiv:2505.13738). It
# starts from that of the default run: 2,048 tokens per step for 1.6 million tokens.
_BATCH_TOKENS, _BATCH_AT_TOKENS, _BATCH_EXPONENT = 2048, 1.6e6, 0.4

Changes = dict[str, int | float | None]  # key of params.yaml -> value


@dataclass(frozen=True)
class Shape:
    """A network, except for what it shares with that of params.yaml."""

    n_layer: int
    n_embd: int

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}"


SHAPES = (
    Shape(2, 64),
    Shape(4, 64),
    Shape(4, 128),
    Shape(4, 192),
    Shape(4, 256),
    Shape(6, 384),
    Shape(8, 512),
    Shape(12, 768),
    Shape(16, 1024),
    Shape(24, 1536),
    Shape(32, 2048),
)


@dataclass(frozen=True)
class Candidate:
    """A network, and what was measured of it."""

    shape: Shape
    n_multiplied: int  # parameters that are multiplied with every token
    timing: Timing


@dataclass(frozen=True)
class Budget:
    """What a training may take."""

    seconds: float
    n_train_tokens: int  # of the text
    tokens_per_step: int

    def n_steps(self, candidate: Candidate) -> int:
        """The number of steps that fit beside the validations, without those that teach nothing more."""
        timing = candidate.timing
        seconds = self.seconds - timing.total(0, 1 + _N_VALIDATIONS)
        max_passes = 1 + _MAX_REPEATS * useful_repeats(candidate.n_multiplied, self.n_train_tokens)
        n_useful = max_passes * self.n_train_tokens / self.tokens_per_step
        return max(0, int(min(seconds / timing.step, n_useful)))

    def n_passes(self, n_steps: int) -> float:
        """The number of passes over the text."""
        return n_steps * self.tokens_per_step / self.n_train_tokens

    def loss(self, candidate: Candidate, n_steps: int) -> float:
        """The loss of the law after a number of steps, for comparisons."""
        return relative_loss(candidate.n_multiplied, n_steps * self.tokens_per_step, self.n_train_tokens)


@dataclass(frozen=True)
class Choice:
    """The training that a candidate can make within the budget."""

    candidate: Candidate
    n_steps: int
    loss: float  # of the law


def choices(candidates: Iterable[Candidate], budget: Budget) -> Iterator[Choice]:
    """Yield what each candidate can do within the budget. Candidates come from small to large.

    Ends when some in a row are worse than the best before them, or when one cannot make enough steps.
    """
    lowest, n_worse = math.inf, 0
    for candidate in candidates:
        n_steps = budget.n_steps(candidate)
        if n_steps < MIN_STEPS:
            return
        loss = budget.loss(candidate, n_steps)
        yield Choice(candidate, n_steps, loss)
        n_worse = 0 if loss < lowest else n_worse + 1
        lowest = min(lowest, loss)
        if n_worse == _N_WORSE:
            return


def proposed_batch_size(n_tokens: float, context_length: int) -> int:
    """Sequences per step for a training of `n_tokens` tokens: a power of two."""
    tokens = _BATCH_TOKENS * (max(1.0, n_tokens) / _BATCH_AT_TOKENS) ** _BATCH_EXPONENT
    return int(2 ** max(0, round(math.log2(tokens / context_length))))


def changes_for(params: Params, shape: Shape, budget: Budget, n_steps: int) -> Changes:
    """The values of params.yaml that a training of `n_steps` steps needs.

    The learning rate falls with the square root of the width: updates of Muon, whose root mean square does not
    depend on the width, then change a layer's output equally (Yang et al., 2023, arXiv:2310.17813).
    """
    model, train, width = params.model, params.train, shape.n_embd
    n_head = width // _HEAD_WIDTH
    changes: Changes = {
        "model.n_layer": shape.n_layer,
        "model.n_head": n_head,
        "model.n_kv_head": n_head,
        "model.n_embd": width,
        "model.n_inner": 4 * width if model.architecture == "gpt2" else 32 * round(width / 12),  # about 8/3
        "train.lr": float(f"{train.lr * math.sqrt(model.n_embd / width):.2g}"),
        "train.warmup_steps": min(train.warmup_steps, n_steps // 10),
        "train.batch_size": budget.tokens_per_step // model.context_length,
        "train.max_steps": n_steps,
        "train.eval_every": -(-n_steps // _N_VALIDATIONS),
    }
    # Values that could contradict the others.
    if model.head_dim is not None:
        changes["model.head_dim"] = None
    if train.micro_batch_size is not None:
        changes["train.micro_batch_size"] = None
    if train.epochs is not None:
        changes["train.epochs"] = None
    return changes


def changed(params: Params, changes: Mapping[str, int | float | None]) -> Params:
    """`params` with other values of the sections `model` and `train`."""
    model = {key.removeprefix("model."): value for key, value in changes.items() if key.startswith("model.")}
    train = {key.removeprefix("train."): value for key, value in changes.items() if key.startswith("train.")}
    sections = {
        "model": params.model.model_copy(update=model),
        "train": params.train.model_copy(update=train),
    }
    return params.model_copy(update=sections)


def as_options(changes: Changes) -> str:
    """The options of `dvc exp run` that set these values."""
    return " ".join(f"-S {key}={'null' if value is None else value}" for key, value in changes.items())

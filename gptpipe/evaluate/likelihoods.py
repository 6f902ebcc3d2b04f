"""How likely a model finds given continuations of given texts: the basis of minimal pairs, cloze and tasks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptpipe.model.device import autocast
from gptpipe.model.gpt import GPT, document_mask
from gptpipe.score.scoring import Scoring

_MAX_VALUES = 1 << 24  # logits, or entries of the mask, in one forward pass: 64 MB in float32


class Question(NamedTuple):
    """Token ids of a text, at least one, and of its continuation, at least one."""

    context: Sequence[int]
    target: Sequence[int]


class Likelihood(NamedTuple):
    """What the model says about the target of a question."""

    nats: float  # the negative log-likelihood of the target, over all its tokens
    is_greedy: bool  # each token of the target is the most probable one after those before it


def likelihoods(model: GPT, questions: Sequence[Question], scoring: Scoring) -> list[Likelihood]:
    """The likelihood of each target, in the order of the questions.

    Of a question longer than the context of the model, only the end is used. Questions of similar length are
    computed together; the size of a batch affects only rounding.
    """
    lengths = [_cut_length(model, question) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: -lengths[i])
    answers: dict[int, Likelihood] = {}
    was_training = model.training
    model.eval()
    try:
        while len(answers) < len(questions):
            rest = order[len(answers) :]
            batch = rest[: _batch_size(model, lengths[rest[0]], [len(questions[i].target) for i in rest])]
            answers |= zip(batch, _answer(model, [questions[i] for i in batch], scoring), strict=True)
    finally:
        model.train(was_training)
    return [answers[i] for i in range(len(questions))]


def _cut_length(model: GPT, question: Question) -> int:
    """The number of tokens that the model reads; it does not read the last one."""
    return min(model.params.context_length, len(question.context) + len(question.target) - 1)


def _batch_size(model: GPT, length: int, target_lengths: list[int]) -> int:
    """How many of the next questions, of at most `length` tokens, fit into one forward pass."""
    most = max(1, _MAX_VALUES // length**2)
    most_targets = max(min(n, length) for n in target_lengths[:most])
    return min(most, max(1, _MAX_VALUES // max(1, most_targets * model.vocab_size)))


@torch.no_grad()
def _answer(model: GPT, questions: list[Question], scoring: Scoring) -> list[Likelihood]:
    """Answer questions in one forward pass. Shorter ones are padded at their end, where no token sees it."""
    context_length = model.params.context_length
    texts = [[*question.context, *question.target][-context_length - 1 :] for question in questions]
    n_targets = [min(len(question.target), context_length) for question in questions]
    longest = max(map(len, texts))
    device = model.embedding.weight.device
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)  # (B, T + 1)
    is_target = torch.zeros_like(ids, dtype=torch.bool)
    for row, (text, n) in enumerate(zip(texts, n_targets, strict=True)):
        is_target[row, len(text) - n : len(text)] = True

    windows = ids[:, :-1]
    mask = None if scoring.end_of_text is None else document_mask(windows, scoring.end_of_text)
    with autocast(device, scoring.precision):
        hidden = model.hidden(windows, mask=mask)[is_target[:, 1:]]  # (all targets, D)
        logits = model.head(hidden).float()  # (all targets, V)
    targets = ids[is_target]
    nats = torch.split(F.cross_entropy(logits, targets, reduction="none").double().cpu(), n_targets)
    hits = torch.split((logits.argmax(dim=-1) == targets).cpu(), n_targets)
    return [Likelihood(float(n.sum()), bool(h.all())) for n, h in zip(nats, hits, strict=True)]

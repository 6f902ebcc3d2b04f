"""Likelihoods of continuations, compared with a forward pass for each."""

from typing import Any

import pytest
import tiny
import torch

from gptpipe.evaluate import likelihoods as module
from gptpipe.evaluate.likelihoods import Likelihood, Question, likelihoods
from gptpipe.model.gpt import GPT, document_mask
from gptpipe.score.scoring import Scoring

CONTEXT = 16  # of the tiny network
QUESTIONS = [
    Question(tiny.token_ids(n, seed=n).tolist(), tiny.token_ids(m, seed=n + 100 * m).tolist())
    for n, m in [(1, 1), (5, 3), (1, 16), (15, 2), (30, 4), (3, 40), (2, 2)]
]


def alone(model: GPT, question: Question, end_of_text: int | None) -> Likelihood:
    """The likelihood token by token, from the end of the text that the model can read."""
    text = [*question.context, *question.target][-CONTEXT - 1 :]
    ids = torch.tensor([text[:-1]])
    mask = None if end_of_text is None else document_mask(ids, end_of_text)
    logits = model.head(model.hidden(ids, mask=mask))[0].log_softmax(-1)
    first = max(1, len(text) - len(question.target))
    nats = [-logits[i - 1, text[i]].item() for i in range(first, len(text))]
    is_greedy = all(logits[i - 1].argmax().item() == text[i] for i in range(first, len(text)))
    return Likelihood(pytest.approx(sum(nats), rel=1e-5), is_greedy)


@pytest.mark.parametrize("max_values", [1, 2000, 1 << 24], ids=["one at once", "a few", "all"])
@pytest.mark.parametrize("end_of_text", [None, 7])
@pytest.mark.parametrize("switches", [{}, tiny.SWITCHES[0]], ids=["qwen3", "gpt2"])
@torch.no_grad()
def test_each_question_is_answered_as_if_alone(
    switches: dict[str, Any], end_of_text: int | None, max_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_VALUES", max_values)
    model = tiny.network(**switches)
    questions = [*QUESTIONS, Question([4, 7, 9, 7], [7, 3, 7, 5])]
    expected = [alone(model, question, end_of_text) for question in questions]
    assert likelihoods(model, questions, Scoring(end_of_text=end_of_text)) == expected


@torch.no_grad()
def test_the_most_probable_continuation_is_greedy() -> None:
    model = tiny.network()
    text = [3, 8]
    for _ in range(4):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    other = (text[4] + 1) % 50
    questions = [Question(text[:2], text[2:]), Question(text[:2], [*text[2:4], other, text[5]])]
    assert [answer.is_greedy for answer in likelihoods(model, questions, Scoring())] == [True, False]


def test_no_question_has_no_answer_and_the_mode_of_the_network_stays() -> None:
    model = tiny.network().train()
    assert likelihoods(model, [], Scoring()) == []
    likelihoods(model, QUESTIONS[:1], Scoring())
    assert model.training

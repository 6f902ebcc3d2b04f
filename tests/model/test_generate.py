"""Drawing the next token, and generating with a cache and a sliding context."""

from typing import Any

import pytest
import tiny
import torch

from gptpipe.model.generate import Sampling, draw, generate
from gptpipe.model.gpt import GPT
from gptpipe.shell.errors import ConfigError, NumericError, ResourceError

PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])


def drawn(sampling: Sampling, n: int = 20_000) -> list[float]:
    """Shares of the four tokens among `n` draws."""
    ids = draw(PROBABILITIES.log().expand(n, 4), sampling, torch.Generator().manual_seed(3))
    return (ids.bincount(minlength=4) / n).tolist()


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
        (Sampling(temperature=5e-324), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [0.0025 / 0.365, 0.25 / 0.365, 0.0225 / 0.365, 0.09 / 0.365]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_k=2), [0, 0.625, 0, 0.375]),
        (Sampling(top_k=9), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(top_p=0.4), [0, 1, 0, 0]),
        (Sampling(top_p=0.6), [0, 0.625, 0, 0.375]),
        (Sampling(top_p=0.9), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
        (Sampling(min_p=0.55), [0, 0.625, 0, 0.375]),  # at least 0.55 x 0.5
        (Sampling(min_p=1.0), [0, 1, 0, 0]),
        (Sampling(temperature=0.5, min_p=0.3), [0, 0.25 / 0.34, 0, 0.09 / 0.34]),  # after the temperature
        (Sampling(top_k=3, top_p=0.8), [0, 0.625, 0, 0.375]),  # top_p applies to what top_k leaves
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling, shares: list[float]) -> None:
    """The standard deviation of a share of 20,000 draws is at most 0.0035; probability 0 gives exactly 0."""
    drawn_shares = drawn(sampling)
    assert drawn_shares == pytest.approx(shares, abs=0.014)
    assert [share == 0 for share in drawn_shares] == [share == 0 for share in shares]


def test_top_k_keeps_k_of_equally_probable_tokens() -> None:
    ids = draw(torch.zeros(2000, 5), Sampling(top_k=2), torch.Generator().manual_seed(0))
    assert len(ids.unique()) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_invalid_sampling_options_are_a_config_error(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ConfigError, match=f"^{name} is {value}; it must be "):
        Sampling(**values)


def without_cache(model: GPT, prompt: torch.Tensor, n: int) -> list[int]:
    """Greedy tokens, each from a pass over the whole context, which drops its older half when it is full."""
    context = prompt[:, -model.params.context_length :]
    new = []
    for _ in range(n):
        if context.shape[1] > model.params.context_length:
            context = context[:, -(model.params.context_length // 2) :]
        with torch.no_grad():
            new.append(model(context)[:, -1].argmax(dim=-1)[:, None])
        context = torch.cat((context, new[-1]), dim=1)
    return torch.cat(new, dim=1).tolist()


@pytest.mark.parametrize("switches", tiny.SWITCHES[::3], ids=lambda s: str(s["architecture"]))
@pytest.mark.parametrize("n_prompt", [1, 5, 16, 23])
def test_greedy_generation_with_a_cache_equals_generation_without_one(
    switches: dict[str, Any], n_prompt: int
) -> None:
    model, prompts = tiny.network(**switches), tiny.token_ids(2, n_prompt)
    steps = list(generate(model, prompts, 40, Sampling(temperature=0)))
    assert torch.stack(steps, dim=1).tolist() == without_cache(model, prompts, 40)


def test_the_same_seed_draws_the_same_tokens() -> None:
    model, prompt = tiny.network(), tiny.token_ids(1, 3)
    texts = [[int(t) for t in generate(model, prompt, 30, Sampling(seed=seed))] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("was_training", [True, False])
@pytest.mark.parametrize("n_taken", [1, 5])
def test_generation_does_not_disturb_training(was_training: bool, n_taken: int) -> None:
    model = tiny.network(dropout=0.5).train(was_training)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    steps = generate(model, tiny.token_ids(1, 3), 5, Sampling())
    for _ in range(n_taken):
        next(steps)
    steps.close()  # the reader may stop early
    assert model.training is was_training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cache_that_does_not_fit_in_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is that of keys and values of 2 layers, 2 heads, 8 numbers, for the context or fewer tokens."""
    model, prompt = tiny.network(), tiny.token_ids(1, 3)
    monkeypatch.setattr("gptpipe.model.generate.available_memory", lambda _: 2 * 2 * 2 * 8 * 4 * 15)
    assert len(list(generate(model, prompt, 12, Sampling()))) == 12
    with pytest.raises(ResourceError, match="generate fewer tokens"):
        list(generate(model, prompt, 10**15, Sampling()))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_a_numeric_error(temperature: float) -> None:
    model = tiny.network()
    with torch.no_grad():
        model.final_norm.weight.fill_(3e38)
    with pytest.raises(NumericError, match="logits are not finite"):
        list(generate(model, tiny.token_ids(1, 3), 1, Sampling(temperature=temperature)))

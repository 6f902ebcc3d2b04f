"""Drawing the next token, and generating with a cache and a sliding context."""

from typing import Any

import pytest
import tiny
import torch

from gptpipe.model import decoding
from gptpipe.model import generate as module
from gptpipe.model.generate import Batch, Sampling, TokenSequence, draw, generate, token_log_probabilities
from gptpipe.model.gpt import GPT
from gptpipe.shell.errors import ConfigError, NumericError, ResourceError

PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])


def random_numbers(n: int) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def drawn(sampling: Sampling, n: int = 20_000) -> list[float]:
    """Shares of the four tokens among `n` draws."""
    ids = draw(PROBABILITIES.log().expand(n, 4), sampling, random_numbers(n))
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
    assert len(draw(torch.zeros(2000, 5), Sampling(top_k=2), random_numbers(2000)).unique()) == 2


@pytest.mark.parametrize("sampling", [Sampling(min_p=0.5), Sampling(top_p=0.6), Sampling(top_k=2)])
def test_the_largest_and_smallest_random_number_draw_no_excluded_token(sampling: Sampling) -> None:
    logits = torch.tensor([0.05, 0.5, 0.3, 0.15]).log().expand(2, 4)
    assert draw(logits, sampling, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


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


@pytest.mark.parametrize("switches", tiny.SWITCHES, ids=lambda s: str(s["architecture"]))
@pytest.mark.parametrize("n_prompt", [1, 5, 16, 23])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_greedy_generation_with_a_cache_equals_generation_without_one(
    switches: dict[str, Any], n_prompt: int, is_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are spread over several processes take another path."""
    monkeypatch.setattr(module, "is_sharded", lambda _: is_sharded)
    model, prompts = tiny.network(**switches), tiny.token_ids(2, n_prompt)
    steps = list(generate(model, prompts.tolist(), 40, Sampling(temperature=0)))
    assert torch.tensor(steps).T.tolist() == without_cache(model, prompts, 40)


@pytest.mark.parametrize("switches", tiny.SWITCHES, ids=lambda s: str(s["architecture"]))
@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_step_of_one_token_has_the_logits_of_the_network(switches: dict[str, Any], n_rows: int) -> None:
    """Rows of other lengths, in any order; every weight of the network matters, also biases."""
    model = tiny.network(**switches)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    lengths, rows = [4, 9, 1], [2, 0, 1][:n_rows]
    tokens = tiny.token_ids(3, 12)
    cache = model.new_cache(3, 12)
    decoder = decoding.Decoder(model)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            model.hidden(tokens[row : row + 1, :length], cache, rows=[row])
        new = torch.stack([tokens[row, lengths[row]] for row in rows])
        logits = decoder.logits(new, cache, rows)
        for row, ours in zip(rows, logits, strict=True):
            expected = model(tokens[row : row + 1, : lengths[row] + 1])[0, -1]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert [cache.lengths[row] for row in rows] == [lengths[row] + 1 for row in rows]


OPTIONS = (
    {"temperature": 0},
    {"seed": 5},
    {"seed": 6, "top_k": 7, "repetition_penalty": 1.3},
    {"seed": 5, "temperature": 1.5, "top_p": 0.8, "min_p": 0.01},
)


@pytest.mark.parametrize("switches", tiny.SWITCHES[::2], ids=lambda s: str(s["architecture"]))
def test_a_batch_gives_each_prompt_the_tokens_that_it_gets_alone(switches: dict[str, Any]) -> None:
    """Prompts of different lengths, other options for each; sequences join and leave while others go on."""
    model = tiny.network(**switches)
    prompts = [tiny.token_ids(n, seed=n).tolist() for n in (1, 2, 14, 9, 20, 16, 5, 3)]
    options = [Sampling(**OPTIONS[number % 4]) for number in range(len(prompts))]
    alone = [
        [token for (token,) in generate(model, [prompt], 25, sampling)]
        for prompt, sampling in zip(prompts, options, strict=True)
    ]
    batch, sequences = Batch(model, 4, 1000), []
    for step in range(70):
        for sequence in [s for s in batch.sequences if len(s.tokens) == len(prompts[sequences.index(s)]) + 25]:
            batch.remove(sequence)
        n_joining = min(2, 4 - len(batch.sequences), len(prompts) - len(sequences)) if step % 3 == 0 else 0
        for _ in range(n_joining):  # two at once are padded
            sequences.append(TokenSequence(prompts[len(sequences)], options[len(sequences)]))
            batch.add(sequences[-1])
        batch.step()
    together = [s.tokens[len(prompt) :] for s, prompt in zip(sequences, prompts, strict=True)]
    assert together == alone


def test_long_prompts_are_started_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding stays below half of a pass."""
    monkeypatch.setattr(module, "_STARTED_AT_ONCE", 20)
    lengths = dict(enumerate([9, 2, 10, 4, 30, 3]))
    assert list(module._groups(lengths)) == [[4], [2, 0], [3, 5, 1]]
    model = tiny.network()
    prompts = [tiny.token_ids(n, seed=n).tolist() for n in lengths.values()]
    (together,) = generate(model, prompts, 1, Sampling(temperature=0))
    assert together == [next(generate(model, [prompt], 1, Sampling(temperature=0)))[0] for prompt in prompts]


def test_the_same_seed_draws_the_same_tokens() -> None:
    model, prompt = tiny.network(), tiny.token_ids(1, 3).tolist()
    texts = [list(generate(model, prompt, 30, Sampling(seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_log_probabilities_are_those_of_the_network() -> None:
    """Before temperature and penalty; of the drawn token, and of the most probable ones."""
    model, prompt = tiny.network(), tiny.token_ids(6).tolist()
    batch = Batch(model, 2, 20)
    sequence = TokenSequence(prompt, Sampling(temperature=2.0, repetition_penalty=1.4), 3)
    batch.add(TokenSequence([1], Sampling()))
    batch.add(sequence)
    for n_new in range(5):
        other, token = batch.step()
        assert other.log_probability is None
        with torch.no_grad():
            expected = model(torch.tensor([sequence.tokens[:-1]]))[0, -1].log_softmax(dim=-1)
        assert sequence.tokens[6 + n_new] == token.id
        assert token.log_probability == pytest.approx(expected[token.id].item(), abs=1e-5)
        values, ids = expected.topk(3)
        assert [id_ for id_, _ in token.alternatives] == ids.tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(values.tolist(), abs=1e-5)


def test_tokens_of_a_text_are_scored_given_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORED_AT_ONCE", 4)
    model, tokens = tiny.network(), tiny.token_ids(11)
    scored = token_log_probabilities(model, tokens.tolist(), 2)
    assert [token.id for token in scored] == tokens[1:].tolist()
    assert all(len(token.alternatives) == 2 for token in scored)
    loss = model.loss(tokens[None, :-1], tokens[None, 1:]).item()
    assert -sum(token.log_probability or 0 for token in scored) / 10 == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("was_training", [True, False])
@pytest.mark.parametrize("n_taken", [1, 5])
def test_generation_does_not_disturb_training(was_training: bool, n_taken: int) -> None:
    model = tiny.network(dropout=0.5).train(was_training)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    steps = generate(model, tiny.token_ids(1, 3).tolist(), 5, Sampling())
    for _ in range(n_taken):
        next(steps)
    steps.close()  # the reader may stop early
    assert model.training is was_training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cache_that_does_not_fit_in_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is that of keys and values of 2 layers, 2 heads, 8 numbers, for the context or fewer tokens."""
    model, prompt = tiny.network(), tiny.token_ids(1, 3).tolist()
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
        list(generate(model, tiny.token_ids(1, 3).tolist(), 1, Sampling(temperature=temperature)))

"""The choice of a training within a budget, on made-up timings."""

import json
from collections.abc import Iterator

import pytest
import tiny

from gptpipe.commands.choice import (
    SHAPES,
    Budget,
    Candidate,
    Shape,
    as_options,
    changed,
    changes_for,
    choices,
    proposed_batch_size,
)
from gptpipe.commands.loss_law import relative_loss, useful_repeats, useful_tokens
from gptpipe.commands.probes import Timing
from gptpipe.params import Params

MILLION = 1_000_000


def candidate(n_multiplied: int, step: float, *, warm_up: float = 0.0, validation: float = 0.0) -> Candidate:
    return Candidate(Shape(4, 64), n_multiplied, Timing(warm_up, step, validation))


def test_steps_fit_into_the_time_beside_compilation_and_validations() -> None:
    budget = Budget(seconds=100, n_train_tokens=MILLION, tokens_per_step=1000)
    # 100 s less 10 s to compile and 6 validations of 5 s are 60 s.
    assert budget.n_steps(candidate(MILLION, 0.5, warm_up=10, validation=5)) == 120
    assert budget.n_steps(candidate(MILLION, 0.5, validation=20)) == 0


def test_steps_end_when_more_passes_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpipe.commands.choice.useful_repeats", lambda *_: 4.0)
    budget = Budget(seconds=1e6, n_train_tokens=10_000, tokens_per_step=1000)
    assert budget.n_steps(candidate(MILLION, 0.001)) == 90  # 1 + 2 x 4 passes of 10 steps


def test_a_large_network_gains_less_from_repetitions() -> None:
    assert useful_repeats(4 * MILLION, 100_000) == pytest.approx(useful_repeats(MILLION, 100_000) / 8)
    assert useful_repeats(1000, MILLION) == 15.4  # whatever the size, no more


def test_useful_tokens_saturate() -> None:
    assert useful_tokens(500, 1000, r=10) == 500
    assert useful_tokens(1000, 1000, r=10) == 1000
    assert useful_tokens(2000, 1000, r=10) == pytest.approx(1000 * (1 + 10 * (1 - 0.904837418)))  # exp(-0.1)
    assert useful_tokens(1e9, 1000, r=10) == pytest.approx(11_000)


def test_law_falls_with_tokens_parameters_and_text() -> None:
    losses = [
        relative_loss(MILLION, MILLION, MILLION),
        relative_loss(MILLION, 4 * MILLION, MILLION),
        relative_loss(MILLION, 4 * MILLION, 4 * MILLION),
        relative_loss(4 * MILLION, 4 * MILLION, 4 * MILLION),
    ]
    assert losses == sorted(losses, reverse=True)


def test_little_time_takes_a_small_network_and_much_time_a_large_one() -> None:
    candidates = [candidate(n * MILLION, 0.1 * n) for n in (1, 2, 4, 8, 16, 32, 64)]
    best = []
    for seconds in (60, 600, 6000, 60000):
        tried = choices(candidates, Budget(seconds, 10**10, 2048))
        best.append(min(tried, key=lambda choice: choice.loss).candidate.n_multiplied)
    assert best == sorted(best)
    assert best[0] < best[-1]


def test_a_network_that_is_as_fast_as_a_smaller_one_is_better() -> None:
    small, large = candidate(MILLION, 0.1), candidate(2 * MILLION, 0.1)
    tried = list(choices([small, large], Budget(100, 10**9, 2048)))
    assert tried[1].loss < tried[0].loss


def test_much_larger_networks_are_not_measured() -> None:
    measured = []

    def measuring() -> Iterator[Candidate]:
        for n in (1, 100, 200, 400):
            measured.append(n)
            yield candidate(n * MILLION, 0.1 * n)

    tried = list(choices(measuring(), Budget(1000, 10**9, 2048)))
    assert measured == [1, 100, 200]  # two in a row are worse
    assert [choice.n_steps for choice in tried] == [10_000, 100, 50]


def test_no_choice_if_the_first_network_is_too_slow() -> None:
    assert list(choices([candidate(MILLION, 10.0)], Budget(100, 10**9, 2048))) == []


@pytest.mark.parametrize(
    ("n_tokens", "context_length", "expected"),
    [(1_600_000, 256, 8), (1_600_000, 2048, 1), (1_600_000 * 6, 256, 16), (1000, 256, 1), (0, 256, 1)],
)
def test_batch_size_grows_with_the_tokens(n_tokens: int, context_length: int, expected: int) -> None:
    # 6 ** 0.4 is 2.05.
    assert proposed_batch_size(n_tokens, context_length) == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_every_proposal_is_valid_whatever_params_yaml_has(shape: Shape, architecture: str) -> None:
    odd = {"model__n_head": 8, "model__n_kv_head": 8, "train__epochs": 3.0, "train__micro_batch_size": 3}
    head_dim = None if architecture == "gpt2" else 16
    params = tiny.params(
        **odd,
        model__architecture=architecture,
        model__head_dim=head_dim,
        train__batch_size=6,
        train__max_steps=90,
    )
    budget = Budget(60, 10**6, 16 * 16)
    proposed = changed(params, changes_for(params, shape, budget, 25))
    checked = Params.model_validate_json(
        proposed.model_dump_json(), context=json.loads(proposed.model_dump_json())
    )
    assert checked == proposed
    assert proposed.model.n_embd == 64 * proposed.model.n_head
    assert (proposed.train.batch_size, proposed.train.max_steps, proposed.train.eval_every) == (16, 25, 5)
    assert (proposed.train.epochs, proposed.train.micro_batch_size, proposed.model.head_dim) == (
        None,
        None,
        None,
    )
    assert proposed.train.warmup_steps < proposed.train.max_steps


def test_learning_rate_falls_with_the_square_root_of_the_width() -> None:
    params = tiny.params(model__n_embd=64, train__lr=1e-2)
    changes = changes_for(params, Shape(4, 256), Budget(60, 10**6, 1024), 100)
    assert changes["train.lr"] == 5e-3
    # A proposal for its own network changes nothing.
    proposed = changed(params, changes)
    again = changes_for(proposed, Shape(4, 256), Budget(60, 10**6, 1024), 100)
    assert again == {**changes, **{key: None for key in again if key not in changes}}


def test_options_are_written_as_dvc_reads_them() -> None:
    assert as_options({"model.n_layer": 4, "train.lr": 0.0071, "train.epochs": None}) == (
        "-S model.n_layer=4 -S train.lr=0.0071 -S train.epochs=null"
    )

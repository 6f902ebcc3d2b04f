"""Which changes of settings leave the steps of a training as they are."""

from typing import Any

import pytest
import tiny

from gptpipe.train.settings import Settings, changed_settings, harmful_changes, preventing_changes, settings_of

N_DONE = 7


def settings(**changes: Any) -> Settings:
    params = tiny.params(**changes)
    return settings_of(params, "a" * 64, {}, params.train.max_steps or 1)


def test_the_key_depends_on_every_setting_but_how_processes_are_started() -> None:
    changed: list[dict[str, Any]] = [{}, {"seed": 8}, {"train__lr": 1e-4}, {"train__eval_every": 5}, {}]
    keys = {settings(**changes).key for changes in changed}
    keys |= {settings().model_copy(update={"split": "b" * 64}).key}
    assert len(keys) == 5
    assert settings(train__launcher="torchrun", train__parallel="fsdp").key in keys


@pytest.mark.parametrize(
    "change",
    [
        {"train__save_every": 5},
        {"train__eval_every": 5},
        {"train__patience": 2},
        {"train__sample_prompts": ("a", "b")},
        {"train__sample_tokens": 9},
        {"train__on_spike": "rollback"},
        {"train__spike_sigmas": 5.0},
        {"train__device": "auto"},
        {"train__compile": "auto"},
        {"train__precision": "auto"},
        {"train__micro_batch_size": 4},
        {"train__activation_checkpointing": True},
        {"train__schedule": "constant", "train__max_steps": 50},
    ],
)
def test_a_harmless_change_is_listed_but_does_not_affect_the_steps(change: dict[str, Any]) -> None:
    before = settings(train__schedule="constant")
    now = settings(**{"train__schedule": "constant", **change})
    assert len(changed_settings(before, now)) == 1
    assert harmful_changes(before, now, N_DONE) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"model__dropout": 0.1},
        {"model__context_length": 8},
        {"train__lr": 1e-4},
        {"train__betas": (0.9, 0.99)},
        {"train__grad_clip": None},
        {"train__batch_size": 8},
        {"train__stride": 4},
        {"train__document_masking": True},
        {"train__max_steps": N_DONE - 1},
        {"train__lr": 1e-4, "train__save_every": 5},
    ],
)
def test_a_change_of_arithmetic_is_harmful(change: dict[str, Any]) -> None:
    before = settings(train__schedule="constant")
    now = settings(**{"train__schedule": "constant", **change})
    assert list(harmful_changes(before, now, N_DONE)) == [next(iter(change)).replace("__", ".")]


def test_every_parameter_is_harmful_unless_listed_as_harmless() -> None:
    """A new parameter must not be taken for harmless by default."""
    before = settings()
    now = before.model_copy(update={"train": {**before.train, "new": 1}})
    assert harmful_changes(before, now, N_DONE) == {"train.new": "train.new was null, is 1"}


@pytest.mark.parametrize(
    ("schedule", "n_done", "is_harmless"),
    [
        ("linear", 2, True),  # the warm-up does not depend on the end
        ("linear", 5, False),
        ("cosine", 5, False),
        ("wsd", 12, True),  # the last 8 of 20 steps decay
        ("wsd", 14, False),
        ("constant", 20, True),
    ],
)
def test_more_steps_are_harmless_as_long_as_the_learning_rates_are_the_same(
    schedule: str, n_done: int, is_harmless: bool
) -> None:
    before = settings(train__schedule=schedule, train__max_steps=20)
    now = settings(train__schedule=schedule, train__max_steps=40)
    changes = harmful_changes(before, now, n_done)
    assert changes == ({} if is_harmless else {"train.max_steps": "train.max_steps was 20, is 40"})


def test_settings_of_an_earlier_version_have_unknown_learning_rates() -> None:
    before = settings(train__schedule="constant")
    del (train := {**before.train})["warmup_steps"]
    before = before.model_copy(update={"train": train})
    assert "train.warmup_steps" in harmful_changes(before, settings(train__schedule="constant"), 1)


@pytest.mark.parametrize(
    ("change", "is_possible"),
    [
        ({"train__lr": 1e-4}, True),
        ({"model__dropout": 0.1}, True),
        ({"seed": 8}, True),
        ({"model__n_embd": 64}, False),
        ({"train__optimizer": "muon"}, False),
    ],
)
def test_tensors_of_another_network_or_optimizer_prevent_a_continuation(
    change: dict[str, Any], is_possible: bool
) -> None:
    changes = changed_settings(settings(), settings(**change))
    assert bool(preventing_changes(changes)) is not is_possible
    assert preventing_changes(changed_settings(settings(), settings().model_copy(update={"split": "b"})))

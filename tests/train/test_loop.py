"""The order of events in the training loop, and what one step does."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import tiny
import torch

from gptpipe.score.metrics import Metrics
from gptpipe.shell.errors import Interrupted, NumericError, ResourceError, SpikeError
from gptpipe.train.batches import Batches
from gptpipe.train.loop import train
from gptpipe.train.schedule import learning_rate
from gptpipe.train.state import TrainState
from gptpipe.train.step import Plan, optimizer_step


class RecordedEvents:
    """Events of the loop that keep a list of their calls, and the checkpoints in memory."""

    def __init__(self, state: TrainState, losses: Iterator[float] | None = None) -> None:
        self.state, self.losses = state, losses
        self.calls: list[str] = []
        self.logged: list[tuple[int, Metrics]] = []
        self.stop: Callable[[], None] = lambda: None
        self.saved: TrainState | None = None

    def check_stop(self) -> None:
        self.stop()

    def log(self, step: int, metrics: Metrics) -> None:
        self.logged.append((step, metrics))

    def after_validation(self) -> None:
        self.calls.append(f"report {self.state.step}")

    def validate(self) -> float:
        self.calls.append(f"validate {self.state.step}")
        return next(self.losses) if self.losses else 4.0 - 0.01 * self.state.step

    def save(self) -> None:
        self.calls.append(f"save {self.state.step}")
        self.saved = copy.deepcopy(self.state)

    def roll_back(self, error: NumericError) -> None:
        self.calls.append(f"back: {error.args[0].split(';')[0]}")
        assert self.saved is not None
        kept = copy.deepcopy(self.saved)
        self.state.model.load_state_dict(kept.model.state_dict())
        for ours, theirs in zip(self.state.optimizers, kept.optimizers, strict=True):
            ours.load_state_dict(theirs.state_dict())
        self.state.step, self.state.skipped, self.state.steps = kept.step, kept.skipped, kept.steps

    def run(self, batches: Batches, plan: Plan) -> None:
        train(self.state, batches, plan, self)


def weights(state: TrainState) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in state.model.parameters()]


def test_the_loop_validates_and_saves_at_the_given_steps() -> None:
    state, batches, plan = tiny.trained_state(train__max_steps=7, train__eval_every=3, train__save_every=2)
    events = RecordedEvents(state)
    events.run(batches, plan)
    assert events.calls == [
        *("validate 0", "report 0"),
        "save 2",
        *("validate 3", "report 3"),
        "save 4",
        *("validate 6", "report 6", "save 6"),
        *("validate 7", "report 7", "save 7"),
    ]
    assert [step for step, _ in events.logged] == [1, 2, 3, 4, 5, 6, 7]
    assert [v.step for v in state.history] == [0, 3, 6, 7]
    assert [metrics["train/lr"] for _, metrics in events.logged] == [
        learning_rate(step, 7, plan.params) for step in range(7)
    ]


def test_the_logged_loss_is_that_of_the_step_before_its_update() -> None:
    state, batches, plan = tiny.trained_state()
    with torch.no_grad():
        expected = state.model.loss(*batches.at(0)).item()
    assert optimizer_step(state, batches, plan)["train/loss"] == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        assert state.model.loss(*batches.at(0)).item() < expected


@pytest.mark.parametrize(
    ("architecture", "tied", "optimizer", "first", "eighth"),
    [
        ("gpt2", True, "adamw", (3.94117, 1.65509), (3.87380, 0.74528)),
        ("gpt2", True, "muon", (3.94117, 1.65509), (3.87062, 0.77258)),
        ("llama", True, "adamw", (3.92816, 1.03768), (3.91343, 1.65057)),
        ("llama", True, "muon", (3.92816, 1.03768), (3.88816, 0.94316)),
        ("qwen3", True, "adamw", (3.92682, 1.08093), (3.89173, 1.36102)),
        ("qwen3", True, "muon", (3.92682, 1.08093), (3.87538, 1.03115)),
        ("qwen3", False, "adamw", (3.91202, 0.68658), (3.79467, 0.72620)),
        ("qwen3", False, "muon", (3.91202, 0.68658), (3.83923, 0.72966)),
    ],
)
def test_losses_and_gradient_norms_are_unchanged(
    architecture: str, tied: bool, optimizer: str, first: tuple[float, float], eighth: tuple[float, float]
) -> None:
    """Only an intended change of initial weights, optimizer or data order may change these numbers."""
    changes = {
        "model__architecture": architecture,
        "model__tie_embeddings": tied,
        "train__optimizer": optimizer,
    }
    heads = {"model__n_kv_head": 4 if architecture == "gpt2" else 2}
    state, batches, plan = tiny.trained_state(**changes, **heads, train__lr=1e-2)
    steps = [optimizer_step(state, batches, plan) for _ in range(8)]
    actual = [(metrics["train/loss"], metrics["train/grad_norm"]) for metrics in (steps[0], steps[7])]
    assert actual == [pytest.approx(first, rel=1e-3), pytest.approx(eighth, rel=1e-3)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_change_nothing_but_rounding(optimizer: str) -> None:
    """Compares loss and gradient norm of five steps, to 1 part in 100,000."""
    runs = []
    for size in (4, 2, 1):
        state, batches, plan = tiny.trained_state(train__micro_batch_size=size, train__optimizer=optimizer)
        steps = [optimizer_step(state, batches, plan) for _ in range(5)]
        runs.append([(m["train/loss"], m["train/grad_norm"]) for m in steps])
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            assert actual == pytest.approx(expected, rel=1e-5)


def test_dropout_depends_on_the_step_alone() -> None:
    """Not on what validation and sampling draw from the global generator between steps."""
    runs = []
    for disturbs in (False, True):
        state, batches, plan = tiny.trained_state(model__dropout=0.3, train__micro_batch_size=2)
        for _ in range(3):
            if disturbs:
                torch.manual_seed(99)
                torch.randn(7)
            optimizer_step(state, batches, plan)
        runs.append(weights(state))
    assert runs[0] == runs[1]


def test_each_micro_batch_of_each_step_has_its_own_dropout_seed() -> None:
    state, batches, plan = tiny.trained_state(model__dropout=0.3, train__micro_batch_size=1)
    seen = []
    state.model.embedding.register_forward_hook(lambda *_: seen.append(torch.initial_seed()))
    for _ in range(3):
        optimizer_step(state, batches, plan)
    assert len(set(seen)) == len(seen) == 12


def test_patience_counts_validations_without_a_new_best() -> None:
    losses = [5.0, 4.0, 4.5, 3.9, 3.95, 4.1, 3.9, 3.0]  # an equal loss is not better
    state, batches, plan = tiny.trained_state(train__max_steps=12, train__eval_every=1, train__patience=3)
    events = RecordedEvents(state, iter(losses))
    events.run(batches, plan)
    assert [v.val_loss for v in state.history] == losses[:7]
    assert state.step == 6
    assert state.best is not None
    assert state.best.step == 3


@pytest.mark.parametrize("where", ["loss", "gradient", "last micro-batch"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(where: str, value: float) -> None:
    state, batches, plan = tiny.trained_state(3, train__micro_batch_size=1)
    before = weights(state)
    if where == "gradient":
        state.model.blocks[0].attention.qkv_proj.weight.register_hook(lambda g: g * value)
    else:
        calls = iter([0.0, 0.0, 0.0, value] if where == "last micro-batch" else [value] * 4)
        model = state.model
        plan = replace(plan, loss=lambda x, y: model.loss(x, y) + next(calls))
    with pytest.raises(NumericError, match="step 4: loss") as caught:
        optimizer_step(state, batches, plan)
    assert caught.value.exit_code == 6
    assert (state.step, weights(state)) == (3, before)


def spiked(plan: Plan, model: torch.nn.Module, calls: list[int], factor: float) -> Plan:
    """The plan with the loss multiplied by `factor` at some of its calls, counted from 1."""
    n = iter(range(1, 1000))
    return replace(plan, loss=lambda x, y: model.loss(x, y) * (factor if next(n) in calls else 1.0))


@pytest.mark.parametrize(("sigmas", "stops"), [(10.0, True), (1000.0, False), (None, False)])
def test_a_spike_stops_before_the_update(sigmas: float | None, stops: bool) -> None:
    state, batches, plan = tiny.trained_state(25, train__spike_sigmas=sigmas, train__max_steps=40)
    before = weights(state)
    plan = spiked(plan, state.model, [1], 1.3)  # 3.8 nats to 4.9
    if stops:
        with pytest.raises(
            SpikeError, match=r"step 26: loss 4\.\d+ spikes, 1\d\.\d standard deviations .* 25 steps"
        ):
            optimizer_step(state, batches, plan)
        assert (state.step, weights(state)) == (25, before)
    else:
        optimizer_step(state, batches, plan)
        assert state.step == 26


def test_a_gradient_norm_far_above_recent_ones_is_a_spike() -> None:
    state, batches, plan = tiny.trained_state(25, train__spike_sigmas=10.0, train__max_steps=40)
    state.model.blocks[0].attention.qkv_proj.weight.register_hook(lambda g: g * 1e4)
    with pytest.raises(SpikeError, match=r"step 26: gradient norm .* spikes"):
        optimizer_step(state, batches, plan)


def test_no_spike_is_reported_before_20_steps() -> None:
    state, batches, plan = tiny.trained_state(19, train__spike_sigmas=1.0, train__max_steps=40)
    optimizer_step(state, batches, spiked(plan, state.model, [1], 1.5))
    assert state.step == 20


def test_a_roll_back_skips_the_batches_since_the_checkpoint() -> None:
    changes = {
        "train__max_steps": 8,
        "train__save_every": 3,
        "train__eval_every": 100,
        "train__on_spike": "rollback",
    }
    state, batches, plan = tiny.trained_state(**changes)
    events = RecordedEvents(state)
    seen: list[int] = []
    at = batches.at
    batches.at = lambda step, part: (seen.append(step), at(step, part))[1]  # type: ignore[method-assign]
    events.run(batches, spiked(plan, state.model, [5, 9], math.nan))
    # 8 that count, 2 that failed, and 1 before the first of them that was rolled back.
    assert seen == list(range(11))
    faults = [call for call in events.calls if call.startswith(("back", "save"))]
    assert faults == [
        "save 0",
        "save 3",
        "back: train: step 5: loss nan, gradient norm nan",
        "save 6",
        "back: train: step 7: loss nan, gradient norm nan",
        "save 8",
    ]
    assert (state.step, state.skipped) == (8, 3)
    assert len(state.steps) == 8


@pytest.mark.parametrize(("batch_size", "size", "smaller"), [(12, 4, 2), (9, 9, 3)])
def test_out_of_memory_halves_the_micro_batches_and_continues(
    batch_size: int, size: int, smaller: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradients are the same within rounding. For a batch of 9, half is 3, the next divisor."""
    changes = {"train__batch_size": batch_size, "train__micro_batch_size": size}
    undisturbed, batches, plan = tiny.trained_state(1, **changes)
    state, batches, plan = tiny.trained_state(**changes)
    is_fit, model = iter(([True] if size < batch_size else []) + [False] + [True] * 100), state.model

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Fails with the allocator's error in the second micro-batch, or in the only one."""
        if not next(is_fit):
            torch.empty(1 << 60)
        return model.loss(x, y)

    metrics = optimizer_step(state, batches, replace(plan, loss=loss))
    assert state.micro_batch_size == metrics["train/micro_batch_size"] == smaller
    assert f"out of memory; continuing with micro-batches of {smaller}" in capsys.readouterr().err
    assert state.steps[0] == pytest.approx(undisturbed.steps[0], rel=1e-5)
    assert "train/micro_batch_size" not in optimizer_step(state, batches, plan)


def test_out_of_memory_with_a_single_sequence_is_a_resource_error() -> None:
    state, batches, plan = tiny.trained_state(train__micro_batch_size=2)
    with pytest.raises(ResourceError, match="out of memory with single sequences") as caught:
        optimizer_step(state, batches, replace(plan, loss=lambda x, y: torch.empty(1 << 60)))
    assert caught.value.exit_code == 5


def test_other_errors_of_a_step_are_not_mistaken_for_out_of_memory() -> None:
    state, batches, plan = tiny.trained_state()
    with pytest.raises(RuntimeError, match="shape"):
        optimizer_step(state, batches, replace(plan, loss=lambda x, y: torch.zeros(2) @ torch.zeros(3, 3)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_an_error_and_never_the_best(value: float) -> None:
    state, batches, plan = tiny.trained_state(train__eval_every=2)
    events = RecordedEvents(state, iter([4.0, value]))
    with pytest.raises(NumericError, match="after step 2"):
        events.run(batches, plan)
    assert [v.step for v in state.history] == [0]
    assert "report 2" not in events.calls
    assert "save 2" not in events.calls


@pytest.mark.parametrize("moment", range(14))
def test_a_training_stopped_at_any_moment_continues_like_an_undisturbed_one(moment: int) -> None:
    """Between steps and during validations, the first and the last one included."""
    changes = {"model__dropout": 0.2, "train__max_steps": 8, "train__eval_every": 4}
    undisturbed, batches, plan = tiny.trained_state(**changes)
    RecordedEvents(undisturbed).run(batches, plan)

    state, batches, plan = tiny.trained_state(**changes)
    events = RecordedEvents(state)
    chances = iter(range(100))

    def stop_at_the_moment() -> None:
        if next(chances) == moment:
            raise Interrupted(15, "stopped")

    validate = events.validate

    def interruptible() -> float:
        stop_at_the_moment()
        return validate()

    events.check_stop, events.validate = stop_at_the_moment, interruptible  # type: ignore[method-assign]
    if moment < 11:  # 8 steps and 3 validations
        with pytest.raises(Interrupted):
            events.run(batches, plan)
    events.run(batches, plan)
    assert weights(state) == weights(undisturbed)
    assert state.history == undisturbed.history
    assert [step for step, _ in events.logged] == list(range(1, 9))


def test_the_history_has_losses_and_clipping_since_the_previous_validation() -> None:
    state, batches, plan = tiny.trained_state(train__max_steps=4, train__eval_every=2, train__grad_clip=1e-3)
    events = RecordedEvents(state)
    events.run(batches, plan)
    losses = [metrics["train/loss"] for _, metrics in events.logged]
    assert state.history[0].train_loss is None
    assert [v.train_loss for v in state.history[1:]] == [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    assert [v.max_train_loss for v in state.history[1:]] == [max(losses[:2]), max(losses[2:])]
    assert [v.clipped for v in state.history[1:]] == [1.0, 1.0]
    state, batches, plan = tiny.trained_state(train__max_steps=4, train__eval_every=2, train__grad_clip=None)
    RecordedEvents(state).run(batches, plan)
    assert [v.clipped for v in state.history[1:]] == [0.0, 0.0]

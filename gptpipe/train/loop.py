"""The training loop: steps, validations, saves and roll-backs in their order."""

import math
from typing import Protocol

from gptpipe.score.metrics import Metrics
from gptpipe.shell.errors import NumericError
from gptpipe.train.batches import Batches
from gptpipe.train.state import TrainState
from gptpipe.train.step import STABILITY_ADVICE, Plan, optimizer_step


class Events(Protocol):
    """What a training does around its steps."""

    def check_stop(self) -> None:
        """Called before each step. May raise to end the training; the state can then be saved and continued."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Called with the metrics of each step."""

    def validate(self) -> float:
        """The validation loss of the current weights. May raise like `check_stop`."""

    def after_validation(self) -> None:
        """Called after each validation, once its loss is in the state."""

    def save(self) -> None:
        """Make the state durable."""

    def keep(self) -> None:
        """Keep this state beyond the end of the training."""

    def roll_back(self, error: NumericError) -> None:
        """Restore the state that was saved last, or raise `error`."""


def train(state: TrainState, batches: Batches, plan: Plan, events: Events) -> None:
    """Advance `state` to the last step of the plan, or until patience runs out; a restored state continues.

    Validates at step 0, every `eval_every` steps and at the end; saves every `save_every` steps and at the end.
    After a roll-back, the batches since the last save and the one that failed are skipped. Raises what
    `optimizer_step` raises, except NumericError if `on_spike` is `rollback`, and NumericError for a validation
    loss that is not finite.
    """
    params = plan.params
    _validate_if_due(state, plan, events)
    if params.on_spike == "rollback" and state.step == 0:
        events.save()
    while state.step < plan.n_steps and not state.is_out_of_patience(params.patience):
        events.check_stop()
        try:
            metrics = optimizer_step(state, batches, plan)
        except NumericError as error:
            if params.on_spike == "stop":
                raise
            failed_batch = state.step + state.skipped
            events.roll_back(error)
            state.skipped = failed_batch + 1 - state.step
            continue
        events.log(state.step, metrics)
        if state.step == plan.keep_at:  # before the validation, which a longer training may not make here
            events.keep()
        _validate_if_due(state, plan, events)
        if state.step % params.save_every == 0 or state.step == plan.n_steps:
            events.save()


def _validate_if_due(state: TrainState, plan: Plan, events: Events) -> None:
    is_due = state.step % plan.params.eval_every == 0 or state.step == plan.n_steps
    if not is_due or state.is_validated:
        return
    loss = events.validate()
    if not math.isfinite(loss):
        raise NumericError(f"train: validation loss is {loss} after step {state.step}; {STABILITY_ADVICE}")
    state.add_validation(loss, plan.params.grad_clip)
    events.after_validation()

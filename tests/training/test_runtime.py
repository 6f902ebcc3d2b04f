"""What a training runs on: the size of micro-batches, and signals."""

import os
import signal
from typing import Any

import pytest
import tiny
import torch

from gptpipe.config import TrainParams
from gptpipe.errors import ConfigError, Interrupted, ResourceError
from gptpipe.training.runtime import estimated_bytes, micro_batch_size, noted_signals, resolve

QWEN3, GPT2 = (tiny.model_params(architecture=name, n_kv_head=4) for name in ("qwen3", "gpt2"))


def section(**changes: Any) -> TrainParams:
    return TrainParams(**{**tiny.TRAIN, **changes})


@pytest.mark.parametrize("batch_size", [1, 7, 12])
def test_the_largest_divisor_that_fits(batch_size: int) -> None:
    model = tiny.network()
    for room_for in range(1, 15):
        free = int(estimated_bytes(model, room_for) / 0.9) + 2
        found = micro_batch_size(section(batch_size=batch_size), model, free)
        assert found == max(n for n in range(1, room_for + 1) if batch_size % n == 0)


def test_a_size_that_is_given_is_taken_or_refused() -> None:
    model = tiny.network()
    free = int(estimated_bytes(model, 2) / 0.9) + 2
    assert micro_batch_size(section(micro_batch_size=2), model, free) == 2
    with pytest.raises(ResourceError, match="micro-batches of 4 need about"):
        micro_batch_size(section(micro_batch_size=4), model, free)


def test_nothing_fits() -> None:
    with pytest.raises(ResourceError, match="micro-batches of 1 need about"):
        micro_batch_size(section(), tiny.network(), 10_000)


def test_the_estimate_grows_with_the_sequences_and_shrinks_with_checkpointing() -> None:
    model = tiny.network()
    kept = [estimated_bytes(model, n) for n in (1, 2, 3)]
    assert kept[1] - kept[0] == kept[2] - kept[1] > 0
    assert kept[0] > 4 * 4 * model.n_parameters()  # weights, gradients and two moments in float32
    model.activation_checkpointing = True
    assert estimated_bytes(model, 1) < kept[0]


@pytest.mark.parametrize("device", ["cuda:77", "abacus", "cpu:x"])
def test_a_device_that_is_not_there_is_told(device: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.device"):
        resolve(section(device=device), 1e9, QWEN3)


def test_explicit_values_are_kept() -> None:
    found = resolve(section(device="cpu", precision="bfloat16", compile=True), 1e9, QWEN3)
    assert (found.device.type, found.precision, found.compiles) == ("cpu", torch.bfloat16, True)
    plain = resolve(section(device="cpu", precision="auto", compile="auto"), 1e9, QWEN3)
    assert (plain.precision, plain.compiles) == (torch.float32, False)


def test_a_long_training_compiles_where_a_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == "g++" else None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    auto = section(device="cpu", compile="auto")
    an_hour = 3600 * 3e10 * 3
    shares = (0.1, 0.4, 0.6, 10)
    assert [resolve(auto, share * an_hour, QWEN3).compiles for share in shares] == [False, False, True, True]
    assert not resolve(auto, an_hour, GPT2).compiles
    assert not resolve(section(device="cpu", compile=False), an_hour, QWEN3).compiles
    with monkeypatch.context() as ranked:
        two_ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for name, value in {**two_ranks, "TORCHELASTIC_RUN_ID": "test"}.items():
            ranked.setenv(name, value)
        assert not resolve(auto, an_hour, QWEN3).compiles
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not resolve(auto, an_hour, QWEN3).compiles


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_stop_and_handlers_come_back(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with noted_signals() as check:
        check()
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted) as caught:
            check()
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with noted_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143

"""What a training runs on: the size of micro-batches, and signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from gptpipe.model import device
from gptpipe.shell.errors import ConfigError, Interrupted, ResourceError
from gptpipe.train import runtime
from gptpipe.train.memory import estimated_bytes, fitting_micro_batch_size
from gptpipe.train.params import TrainParams
from gptpipe.train.runtime import resolve_runtime
from gptpipe.train.signals import deferred_signals

ROOT = Path(__file__).parents[2]
estimated = partial(estimated_bytes, holds_all_logits=True)
fitting = partial(fitting_micro_batch_size, holds_all_logits=True)
QWEN3, GPT2 = (tiny.model_params(architecture=name, n_kv_head=4) for name in ("qwen3", "gpt2"))


def section(**changes: Any) -> TrainParams:
    return TrainParams(**{**tiny.TRAIN, **changes})


@pytest.mark.parametrize("batch_size", [1, 7, 12])
def test_the_micro_batch_size_is_the_largest_divisor_that_fits(batch_size: int) -> None:
    model = tiny.network()
    for room_for in range(1, 15):
        free = int(estimated(model, room_for) / 0.9) + 2
        found = fitting(section(batch_size=batch_size), model, free)
        assert found == max(n for n in range(1, room_for + 1) if batch_size % n == 0)


def test_a_given_micro_batch_size_is_used_or_refused() -> None:
    model = tiny.network()
    free = int(estimated(model, 2) / 0.9) + 2
    assert fitting(section(micro_batch_size=2), model, free) == 2
    with pytest.raises(ResourceError, match="micro-batches of 4 need about"):
        fitting(section(micro_batch_size=4), model, free)


def test_if_a_single_sequence_does_not_fit_it_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="micro-batches of 1 need about"):
        fitting(section(), tiny.network(), 10_000)


def test_the_memory_estimate_grows_with_sequences_and_shrinks_with_checkpointing() -> None:
    model = tiny.network()
    kept = [estimated(model, n) for n in (1, 2, 3)]
    assert kept[1] - kept[0] == kept[2] - kept[1] > 0
    assert kept[0] > 4 * 4 * model.n_parameters()  # weights, gradients and two moments in float32
    model.activation_checkpointing = True
    assert estimated(model, 1) < kept[0]


PEAK = """
import sys
from pathlib import Path
import torch
from benchmarks.training_speed import ours, stepper
from gptpipe.train.memory import estimated_bytes, fitting_micro_batch_size
def resident(name):
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
sizes, cpu = {"n_layer": 3, "n_head": 4, "n_embd": 256, "context_length": 256}, torch.device("cpu")
model = ours(sizes, sys.argv[1], 8_000)
tokens, targets = torch.randint(8_000, (2, 8, 256))
small = ours({**sizes, "n_layer": 1, "n_embd": 64}, sys.argv[1], 100)
warm = stepper(small, small.loss, cpu, torch.float32, False)
warm(tokens[:1] % 100, targets[:1] % 100)
before = resident("VmRSS") - 4 * sum(p.numel() for p in model.parameters())
step = stepper(model, model.loss, cpu, torch.float32, False)
step(tokens, targets)
step(tokens, targets)
print(estimated_bytes(model, 8, holds_all_logits=False) / (resident("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_memory_estimate_is_close_to_what_a_step_takes(architecture: str) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, architecture], cwd=ROOT, capture_output=True, text=True)
    assert 0.7 < float(done.stdout) < 1.4, done.stderr


def test_the_memory_estimate_includes_all_logits_if_a_step_holds_them() -> None:
    model = tiny.network()
    n_tokens = model.params.context_length * 1000
    whole, some = (estimated_bytes(model, 1000, holds_all_logits=holds) for holds in (True, False))
    assert whole - some == 4 * 3 * model.vocab_size * (n_tokens - 1024)
    eager = resolve_runtime(section(device="cpu"), 1e9, QWEN3)
    assert not eager.holds_all_logits
    assert resolve_runtime(section(device="cpu", precision="bfloat16"), 1e9, QWEN3).holds_all_logits
    assert resolve_runtime(section(device="cpu", compile=True), 1e9, QWEN3).holds_all_logits


def test_the_memory_limit_of_a_container_is_respected(tmp_path: Path) -> None:
    """The limits of its own group and of those above it count; `max` means no limit."""
    for group, limit, current, cached in (("a/b", "max", 70, 0), ("a", "100", 60, 10)):
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "memory.max").write_text(f"{limit}\n")
        (tmp_path / group / "memory.current").write_text(f"{current}\n")
        (tmp_path / group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 1\n")
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/a/b\n")
    assert list(device._free_in_cgroups(tmp_path, tmp_path / "own")) == [50]
    assert list(device._free_in_cgroups(tmp_path, tmp_path / "none")) == []


DESCRIBE = """
import ast, json, sys
from pathlib import Path
from gptpipe.base.code import code_digest
from gptpipe.model.params import ModelParams
from gptpipe.train.params import TrainParams
from gptpipe.train.runtime import resolve_runtime
train, model, *changed_files = ast.literal_eval(sys.argv[1])
runtime = resolve_runtime(TrainParams(**train), 1e9, ModelParams(**model))
print(json.dumps(runtime.describe()))
for name in changed_files:
    with Path(name).open("a") as file:
        file.write("# a comment\\n")
    code_digest.cache_clear()
    print(json.dumps(runtime.describe()))
"""


def described(folder: Path, *changed_files: str, **environment: str) -> list[dict[str, Any]]:
    """The environment that checkpoints record: before any change, and after a change of each file."""
    arguments = repr([tiny.TRAIN, tiny.MODEL, *changed_files])
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_everything_that_affects_the_bits_is_in_the_environment_of_a_checkpoint(tmp_path: Path) -> None:
    """Threads, libraries, whatever else changes how sums are rounded, and the code of a step."""
    shutil.copytree(ROOT / "gptpipe", tmp_path / "gptpipe")
    usual, *changed = described(
        tmp_path, "gptpipe/commands/cli.py", "gptpipe/model/gpt.py", OMP_NUM_THREADS="1"
    )
    assert usual["threads"] == 1
    assert usual["torch"] == torch.__version__
    assert usual["compiled"] is False
    assert usual["cpu_capability"] == torch.backends.cpu.get_cpu_capability()

    def differing(description: dict[str, Any]) -> set[str]:
        return {key for key, value in description.items() if value != usual[key]}

    assert [differing(description) for description in changed] == [set(), {"training_code"}]
    (two_threads,) = described(ROOT, OMP_NUM_THREADS="2")
    assert differing(two_threads) - {"arithmetic"} == {"threads"}
    (plain_kernels,) = described(ROOT, OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="default")
    assert differing(plain_kernels) == {"arithmetic", "cpu_capability"}


def test_the_loss_follows_its_switches() -> None:
    model, (tokens, targets) = tiny.network(), torch.randint(40, (2, 2, 16))
    tokens[:, 7] = end = 3

    def gradient(**switches: Any) -> torch.Tensor:
        model.zero_grad()
        runtime.loss_function(model, section(**switches), end, is_compiled=False)(tokens, targets).backward()
        assert model.embedding.weight.grad is not None
        return model.embedding.weight.grad.clone()

    plain = gradient()
    assert torch.equal(gradient(), plain)
    assert not torch.allclose(gradient(z_loss=0.1), plain)
    assert not torch.allclose(gradient(document_masking=True), plain)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"train\.compile: true needs a C\+\+ compiler"):
        resolve_runtime(section(device="cpu", compile=True), 1e9, QWEN3)


@pytest.mark.parametrize("device", ["cuda:77", "abacus", "cpu:x"])
def test_a_device_that_does_not_exist_is_a_config_error(device: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.device"):
        resolve_runtime(section(device=device), 1e9, QWEN3)


def test_explicit_values_are_kept() -> None:
    found = resolve_runtime(section(device="cpu", precision="bfloat16", compile=True), 1e9, QWEN3)
    assert (found.device.type, found.precision, found.is_compiled) == ("cpu", torch.bfloat16, True)
    plain = resolve_runtime(section(device="cpu", precision="auto", compile="auto"), 1e9, QWEN3)
    assert (plain.precision, plain.is_compiled) == (torch.float32, False)


def test_a_long_training_compiles_if_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == "g++" else None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    auto = section(device="cpu", compile="auto")
    an_hour = 3600 * 3e10 * 3
    shares = (0.1, 0.4, 0.6, 10)
    compiled = [resolve_runtime(auto, share * an_hour, QWEN3).is_compiled for share in shares]
    assert compiled == [False, False, True, True]
    assert not resolve_runtime(auto, an_hour, GPT2).is_compiled
    assert not resolve_runtime(section(device="cpu", compile=False), an_hour, QWEN3).is_compiled
    with monkeypatch.context() as ranked:
        two_ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for name, value in {**two_ranks, "TORCHELASTIC_RUN_ID": "test"}.items():
            ranked.setenv(name, value)
        assert not resolve_runtime(auto, an_hour, QWEN3).is_compiled
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not resolve_runtime(auto, an_hour, QWEN3).is_compiled


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_requests_a_stop_and_the_handlers_are_restored(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with deferred_signals() as check:
        check()
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted) as caught:
            check()
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with deferred_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143

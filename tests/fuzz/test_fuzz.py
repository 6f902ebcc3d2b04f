"""Inputs that were findings once, and a short round of every target."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fuzz import engine
from fuzz.engine import Fuzzer, Target
from fuzz.targets import TARGETS

FINDINGS = Path(__file__).parent / "findings"
EXECUTIONS = 1200  # of the short round


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    made = Fuzzer(TARGETS)
    yield made
    made.close()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_inputs_that_were_findings_are_handled(fuzzer: Fuzzer, target: Target) -> None:
    paths = sorted((FINDINGS / target.name).glob("*"))
    outcomes = fuzzer.replay(target, [path.read_bytes() for path in paths])
    faults = {path.name: outcome.fault for path, outcome in zip(paths, outcomes, strict=True) if outcome.fault}
    assert faults == {}


def test_a_short_round_finds_nothing(fuzzer: Fuzzer) -> None:
    fuzzer.run(EXECUTIONS)
    assert {name: tally.findings for name, tally in fuzzer.tallies.items() if tally.findings} == {}
    assert all(tally.executions for tally in fuzzer.tallies.values())


def test_every_finding_belongs_to_a_target() -> None:
    assert {path.name for path in FINDINGS.iterdir()} <= {target.name for target in TARGETS}


def allocate(_: bytes) -> None:
    bytearray(600 << 20)


def spin(_: bytes) -> None:
    while True:
        time.process_time()


def crash(_: bytes) -> None:
    os.abort()


def raise_an_error(_: bytes) -> None:
    raise ValueError("no error of ours")


@pytest.mark.parametrize(
    ("execute", "fault"),
    [
        (allocate, "takes 600 MiB, the limit is 256"),
        (spin, "hang: more than 0 s of processor time"),
        (crash, "native crash: SIGABRT"),
        (raise_an_error, "ValueError: 'no error of ours'"),
        (lambda _: None, None),
    ],
)
def test_the_engine_notices(
    execute: Callable[[bytes], None], fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "HANG_SECONDS", 0)
    made = Fuzzer([Target("planted", 1, lambda _: [b"seed"], execute, ())])
    try:
        made.run(2)
        found = {fault for fault, _ in made.tallies["planted"].findings.values()}
        assert found == ({fault} if fault else set())
        assert made.tallies["planted"].executions == 2
    finally:
        made.close()


def test_equal_seeds_try_equal_inputs(tmp_path: Path) -> None:
    tried = []
    for jobs in (1, 2):
        path = tmp_path / str(jobs)
        target = Target("noted", 1, lambda _: [b"seed", b"other"], lambda c, p=path: p.open("ab").write(c + b"\n"), ())
        made = Fuzzer([target], seed=3, jobs=jobs)
        made.run(60)
        made.close()
        tried.append(sorted(path.read_bytes().split(b"\n")))
    assert tried[0] == tried[1]
    assert len(set(tried[0])) > 30

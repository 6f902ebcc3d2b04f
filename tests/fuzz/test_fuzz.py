"""Inputs of earlier findings, and a short round of every target."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fuzz import engine, mutations
from fuzz.engine import Fuzzer, Target
from fuzz.targets import TARGETS

FINDINGS = Path(__file__).parent / "findings"
EXECUTIONS = 600  # of the short round
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_earlier_findings_and_a_short_round_give_no_finding() -> None:
    """In a separate process: libraries used by other tests have started threads, which forks would lack."""
    command = [sys.executable, "-m", "tests.fuzz", "--executions", str(EXECUTIONS), "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, "finding: " in done.stdout) == (0, False), done.stdout + done.stderr
    executed = dict(re.findall(r"^\| ([a-z-]+) \| ([\d,]+) \|", done.stdout, re.MULTILINE))
    assert {target.name for target in TARGETS} <= {name for name, n in executed.items() if n != "0"}


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
        (allocate, r"takes [56]\d\d MiB, the limit is 256"),
        (spin, "hang: more than 0 s of processor time"),
        (crash, "native crash: SIGABRT"),
        (raise_an_error, "ValueError: 'no error of ours'"),
        (lambda _: None, None),
    ],
)
def test_the_engine_reports_each_kind_of_finding(
    execute: Callable[[bytes], None], fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "HANG_SECONDS", 0)
    made = Fuzzer([Target("planted", 1, lambda _: [b"seed"], execute, ())])
    try:
        made.run(2)
        found = [fault for fault, _ in made.tallies["planted"].findings.values()]
        assert len(found) == (fault is not None)
        assert fault is None or re.fullmatch(fault, found[0])
        assert made.tallies["planted"].executions == 2
    finally:
        made.close()


@pytest.mark.parametrize("mutation", [mutations.json_tree, mutations.sealed])
def test_json_with_long_integers_is_mutated(mutation: mutations.Mutation) -> None:
    """A mutation that raised an error once ended a worker, which looked like a finding."""
    content = b'{"a": 1%s, "b": 9%s}' % (b"0" * 400, b"0" * 4299)
    assert len({mutation(content, Random(i)) for i in range(200)}) > 20


def test_equal_seeds_try_equal_inputs(tmp_path: Path) -> None:
    tried = []
    for jobs in (1, 2):
        path = tmp_path / str(jobs)
        target = Target(
            "noted", 1, lambda _: [b"seed", b"other"], lambda c, p=path: p.open("ab").write(c + b"\n"), ()
        )
        made = Fuzzer([target], seed=3, jobs=jobs)
        made.run(60)
        made.close()
        tried.append(sorted(path.read_bytes().split(b"\n")))
    assert tried[0] == tried[1]
    assert len(set(tried[0])) > 30

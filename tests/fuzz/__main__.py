"""Replay earlier findings, fuzz parsers, print a table; see `python -m tests.fuzz --help`."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Fuzzer
    from .targets import Target

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--executions", type=int, default=1_000_000, help="in total, shared among the targets")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal inputs")
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--findings", type=Path, default=HERE / "findings", help="folder for inputs that are findings"
    )
    parser.add_argument("--coverage", action="store_true", help="guide one target by coverage; needs atheris")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))  # for tiny.py and sections.py, as in the suite
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])  # of workers
    os.environ.update(
        OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", GPTPIPE_WORKERS="1", GPTPIPE_VERBOSITY="quiet"
    )
    os.environ.pop("DVC_ROOT", None)
    if options.coverage:
        from .coverage import fuzz

        fuzz(
            *(options.target or ["jsonl"]),
            executions=options.executions,
            seconds=options.seconds,
            seed=options.seed,
        )
    # Imported here once: it takes seconds in each forked worker that builds an optimizer or reads an outbox.
    import torch._dynamo  # noqa: F401

    import gptpipe.record.run  # noqa: F401

    from .engine import Fuzzer
    from .targets import TARGETS

    names = [target.name for target in TARGETS]
    if unknown := set(options.target or ()).difference(names):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [target for target in TARGETS if target.name in (options.target or names)]
    started = time.monotonic()
    fuzzer = Fuzzer(chosen, options.seed, options.jobs)
    try:
        lines = [line for target in chosen for line in _replayed(fuzzer, target)]
        fuzzer.run(options.executions, options.seconds)
        print(fuzzer.table(), flush=True)
        print(
            f"\n{time.monotonic() - started:,.0f} s with {options.jobs} jobs, seed {options.seed}", flush=True
        )
        lines += fuzzer.save(options.findings)
    finally:
        fuzzer.close()
    for line in lines:
        print(f"finding: {line}")
    return bool(lines)


def _replayed(fuzzer: "Fuzzer", target: "Target") -> Iterator[str]:
    """Descriptions of earlier findings that are findings again."""
    paths = sorted((HERE / "findings" / target.name).glob("*"))
    outcomes = fuzzer.replay(target, [path.read_bytes() for path in paths])
    for path, outcome in zip(paths, outcomes, strict=True):
        if outcome.fault:
            yield f"{target.name}/{path.name}: {outcome.fault}"


if __name__ == "__main__":
    sys.exit(main())

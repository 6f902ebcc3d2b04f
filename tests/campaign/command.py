"""`python -m tests.campaign`: run a campaign, append each result to a log, and print a summary.

    python -m tests.campaign                               the long one: 1,000 kills, 1,000 damaged files, ...
    python -m tests.campaign --kills 40 --only train kill  only one kind of fault in one stage
    python -m tests.campaign --trial '{"kind": ...}'       repeat one trial, copied from its result
    python -m tests.campaign --summary                     a table of the results so far

Exit code 1 if anything differed. To continue a stopped campaign, repeat the command with the same arguments.
"""

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from campaign.plan import plan
from campaign.processes import REAL_KINDS, real_trials, remove_projects, try_out_for_real
from campaign.project import STAGES

ROOT = Path(__file__).parents[2]
_SHARED_MEMORY = Path("/dev/shm")
_ENOUGH = 2 << 30  # bytes: a worker needs about 100 MB


class Worker:
    """A process of `campaign.worker` with its own folder."""

    def __init__(self, folder: Path, last_stage: str) -> None:
        paths = [str(ROOT), str(ROOT / "tests")]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        outer = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("DVC_", "MLFLOW_", "GPTPIPE_"))
        }
        command = [sys.executable, "-m", "campaign.worker", str(folder), last_stage]
        variables = {**outer, **one_thread, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables, cwd=ROOT
        )
        self.hello = self._answer()

    def try_out(self, trial: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(trial) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self._process.wait()}; see its output above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@contextmanager
def started_worker(last_stage: str = STAGES[-1]) -> Iterator[Worker]:
    """A worker for all stages up to `last_stage`; in shared memory if there is enough: fsync is free there."""
    is_roomy = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > _ENOUGH
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=_SHARED_MEMORY if is_roomy else None) as folder:
        worker = Worker(Path(folder), last_stage)
        try:
            yield worker
        finally:
            worker.close()


def main() -> None:
    options = _options()
    if options.summary:
        print(summary(_read(options.log)))
        return
    if options.trial:
        results = [_one(json.loads(options.trial))]
        print(json.dumps(results[0], indent=2))
    else:
        _run(options)
        results = _read(options.log)
        print(summary(results))
    remove_projects()
    sys.exit(any(result["differences"] for result in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--kills", **number, default=1000, help="signals at file operations and at random times"
    )
    parser.add_argument("--damage", **number, default=1000, help="damaged files that a stage reads")
    parser.add_argument("--cuts", **number, default=300, help="power cuts")
    parser.add_argument("--failures", **number, default=300, help="operations that fail: no space, I/O error")
    parser.add_argument("--leftovers", **number, default=60, help="damaged files that a killed stage left")
    parser.add_argument("--races", **number, default=30, help="the same stage twice at the same time")
    parser.add_argument(
        "--real", **number, default=40, help="trials with real processes: `dvc`, `dvc exp run`, orphans"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="stages and kinds of trials; default: all"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the random choices")
    parser.add_argument("--jobs", **number, default=2, help="number of workers")
    parser.add_argument(
        "--log", type=Path, default=Path("campaign-results.jsonl"), help="file of results, one per line"
    )
    parser.add_argument("--trial", metavar="JSON", help="run only this trial")
    parser.add_argument("--summary", action="store_true", help="summarise the log without running anything")
    return parser.parse_args()


def _one(trial: dict[str, Any]) -> dict[str, Any]:
    if trial["kind"] in REAL_KINDS:
        return try_out_for_real(trial)
    with started_worker(trial["stage"]) as worker:
        return worker.try_out(trial)


def _run(options: argparse.Namespace) -> None:
    """Run the trials that are not in the log yet, and append each result to the log at once."""
    done = {_name(result["trial"]) for result in _read(options.log)}
    todo: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    lock, is_planned = threading.Lock(), threading.Event()
    started, n_done, n_all = time.monotonic(), 0, 0
    errors: list[BaseException] = []
    last_stage = [stage for stage in STAGES if stage in options.only or not set(options.only) & set(STAGES)][-1]

    def fill(hello: dict[str, Any]) -> None:
        nonlocal n_all
        counts = {
            "kill": options.kills,
            "damage": options.damage,
            "cut": options.cuts,
            "fail": options.failures,
            "leftover": options.leftovers,
            "race": options.races,
        }
        only = set(options.only)
        trials = plan(hello, counts, only, options.seed) + real_trials(options.real, only, options.seed)
        for trial in trials:
            if _name(trial) not in done:
                todo.put(trial)
        n_all = todo.qsize()
        is_planned.set()

    def note(result: dict[str, Any]) -> None:
        nonlocal n_done
        with lock:
            n_done += 1
            with options.log.open("a") as log:
                log.write(json.dumps(result) + "\n")
            if result["differences"]:
                print(shown(result), flush=True)
            elif n_done % 20 == 0:
                print(f"{n_done} of {n_all} trials, {time.monotonic() - started:.0f} s", flush=True)

    def work(number: int) -> None:
        try:
            with started_worker(last_stage) as worker:
                if number == 0:
                    fill(worker.hello)
                is_planned.wait()
                while not todo.empty():
                    try:
                        trial = todo.get_nowait()
                    except queue.Empty:
                        return
                    note(try_out_for_real(trial) if trial["kind"] in REAL_KINDS else worker.try_out(trial))
        except BaseException as error:
            errors.append(error)
            is_planned.set()

    threads = [threading.Thread(target=work, args=[number]) for number in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def shown(result: dict[str, Any]) -> str:
    """A differing result as text: the command that repeats the trial, and its differences."""
    again = f"differs: python -m tests.campaign --trial '{json.dumps(result['trial'])}'"
    return "\n".join([again, *(f"    {' '.join(line.split())}" for line in result["differences"])])


def _name(trial: dict[str, Any]) -> str:
    return json.dumps(trial, sort_keys=True)


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def summary(results: list[dict[str, Any]]) -> str:
    """A table of trials and differences by kind and stage, and an example trial for each kind of difference."""
    trials, differing = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    examples: dict[str, tuple[int, dict[str, Any]]] = {}
    for result in results:
        key = result["trial"]["kind"], result["trial"].get("stage", "pipeline")
        trials[key] += 1
        differing[key] += bool(result["differences"])
        for difference in {_kind_of(text) for text in result["differences"]}:
            n, example = examples.get(difference, (0, result["trial"]))
            examples[difference] = n + 1, example
    rows = [
        f"| {kind} | {stage} | {n:,} | {differing[kind, stage]:,} |"
        for (kind, stage), n in sorted(trials.items())
    ]
    seconds = sum(result["seconds"] for result in results)
    lines = [
        "| fault | stage | trials | with differences |",
        "|---|---|---:|---:|",
        *rows,
        f"| all | | {sum(trials.values()):,} | {sum(differing.values()):,} |",
        "",
        f"{seconds / 60:.0f} minutes of trials.",
    ]
    if examples:
        lines += ["", "| difference | trials | one of them |", "|---|---:|---|"]
        lines += [
            f"| {text} | {n} | `{json.dumps(example)}` |" for text, (n, example) in sorted(examples.items())
        ]
    return "\n".join(lines)


def _kind_of(difference: str) -> str:
    """A difference without numbers, ids and paths, so that equal kinds are counted together."""
    promise, _, text = " ".join(difference.split()).partition(": ")
    text = re.sub(r"/[^ ]*/project/", "", text)
    text = re.sub(r"\b(?=\w*\d)[0-9a-f]{8,}\b|\d[\d.,e-]*", "#", text)
    return f"{promise}: {text.split(';')[0][:120]}".replace("|", "/")

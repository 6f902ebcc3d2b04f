"""Runs targets on mutated inputs, in forked workers: a crash, a hang or too much memory ends the worker alone.

A chunk of executions is a pure function of (seed, target, number of its first execution): any number of jobs
tries the same inputs. Within a chunk, an input that is rejected at a place that no other reached before joins
the seeds.
"""

import contextlib
import hashlib
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from gptpipe.shell.errors import GptpipeError

from .mutations import LONGEST, Mutation, mutate

CHUNK = 1000  # executions of one worker
PROGRESS_SECONDS = 30
HANG_SECONDS = 5  # of processor time
_WAIT_SECONDS = 60  # limit for one execution, which may wait for something without using the processor
_MOST_SEEDS = 400  # in a chunk
_LONGEST_KEPT = 5000  # bytes of a finding that is saved in the project
_SHRINK_SECONDS = 5  # for one finding


@dataclass(frozen=True)
class Target:
    """One parser. `make` writes the files around the input into a folder and returns seeds; `execute` parses an
    input and runs in a copy of that folder.
    """

    name: str
    share: int  # of all executions, compared with the shares of other targets
    make: Callable[[Path], list[bytes]]
    execute: Callable[[bytes], object]
    errors: tuple[type[GptpipeError], ...]  # the errors that it documents
    mutations: tuple[Mutation, ...] = ()
    memory: int = 256 << 20  # limit in bytes, above the memory of the worker at its start
    # Parses the same input as the pipeline does, in a separate process; a crash of `execute` is not one of it.
    guarded: Callable[[bytes], object] | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of an input. `place` identifies equal outcomes; a finding has a `fault`."""

    place: str
    fault: str = ""


@dataclass
class Tally:
    """Statistics of one target."""

    executions: int = 0
    rejected: int = 0
    contained: int = 0  # native crashes that the pipeline turns into an error
    peak: int = 0  # bytes above the start
    slowest: float = 0.0  # seconds
    seconds: float = 0.0
    findings: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # place -> fault, input


def examine(target: Target, content: bytes, execute: Callable[[bytes], object] | None = None) -> Outcome:
    """Execute one input in this process."""
    try:
        (execute or target.execute)(content)
    except target.errors as error:
        place, lines = _place(error), str(error).split("\n")
        if any(ord(character) < 32 or 127 <= ord(character) < 160 for line in lines for character in line):
            return Outcome(f"message {place}", f"a control character in the message {str(error)[:200]!r}")
        if len(lines) > 1 and target.name != "params":
            return Outcome(f"message {place}", f"a message of {len(lines)} lines: {str(error)[:200]!r}")
        memory = next((e for e in _chain(error) if isinstance(e, MemoryError)), None)
        if memory is not None:
            return Outcome(f"memory {place}", f"asks for more memory than is there: {str(memory)[:200]}")
        return Outcome(place)
    except BaseException as error:  # a panic of a Rust library is not an Exception
        return Outcome(_place(error), _described(error))
    return Outcome("")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place(error: BaseException) -> str:
    """Class and place of an error and of its cause: the last line of this project, and the last line of all."""
    parts = []
    for one in (error, list(_chain(error))[-1]):
        frames = traceback.extract_tb(one.__traceback__)
        ours = [frame for frame in frames if "/gptpipe/" in frame.filename]
        for frame in (*ours[-1:], *frames[-1:]):
            parts.append(f"{type(one).__name__} {Path(frame.filename).name}:{frame.lineno}")
    return ", ".join(dict.fromkeys(parts))


def _described(error: BaseException) -> str:
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/gptpipe/" in frame.filename]
    where = f"{ours[-1].filename.partition('/gptpipe/')[2]}:{ours[-1].lineno}: " if ours else ""
    return f"{where}{type(error).__name__}: {str(error)[:200]!r}"


class _Shared:
    """The input of the current execution, for the parent to read after a crash."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, LONGEST + 16)

    def note(self, number: int, content: bytes) -> None:
        self._memory[:16] = number.to_bytes(8, "little") + len(content).to_bytes(8, "little")
        self._memory[16 : 16 + len(content)] = content

    def read(self) -> tuple[int, bytes]:
        number, length = (int.from_bytes(self._memory[i : i + 8], "little") for i in (0, 8))
        return number, self._memory[16 : 16 + length]


def _limits(target: Target) -> None:
    """Disable core dumps; limit the address space to the memory limit plus what libraries reserve unused."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + target.memory + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _allow_seconds() -> None:
    """Let SIGXCPU end this process after HANG_SECONDS more of processor time, counted in whole seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + HANG_SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _in_scratch(target: Target, folder: Path, work: Callable[[], None]) -> None:
    """In a worker: run `work` in a copy of the target's folder, and discard its output."""
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        os.chdir(scratch)
        os.environ.update(GPTPIPE_VERBOSITY="quiet", GPTPIPE_WORKERS="1")
        os.environ.pop("DVC_ROOT", None)
        _limits(target)
        work()
        os.chdir(folder)


def _chunk(
    target: Target, seeds: Sequence[bytes], seed: int, numbers: range, shared: _Shared, results: Any
) -> None:
    random, corpus, places = Random(f"{seed}:{target.name}:{numbers[0]}"), list(seeds), set[str]()
    figures = Tally()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        content = mutate(random.choice(corpus), corpus, target.mutations, random)
        shared.note(number, content)
        _allow_seconds()
        started = time.perf_counter()
        outcome = examine(target, content)
        figures.slowest = max(figures.slowest, time.perf_counter() - started)
        figures.executions += 1
        figures.rejected += bool(outcome.place)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) << 10
        if peak > target.memory and figures.peak <= target.memory and not outcome.fault:
            outcome = Outcome(
                f"memory {outcome.place}", f"takes {peak >> 20} MiB, the limit is {target.memory >> 20}"
            )
        figures.peak = max(figures.peak, peak)
        if outcome.fault and outcome.place not in figures.findings:
            figures.findings[outcome.place] = (outcome.fault, content)
        if outcome.place not in places and len(corpus) < _MOST_SEEDS:
            corpus.append(content)
        places.add(outcome.place)
        if figures.peak > target.memory:  # continue in a worker with fresh memory
            break
    results.send((figures, figures.executions))


def _examine_one(target: Target, content: bytes, execute: Any, shared: _Shared, results: Any) -> None:
    shared.note(0, content)
    _allow_seconds()
    results.send((examine(target, content, execute), 1))


def _replay(target: Target, contents: Sequence[bytes], shared: _Shared, results: Any) -> None:
    outcomes = []
    for number, content in enumerate(contents):
        shared.note(number, content)
        _allow_seconds()
        outcomes.append(examine(target, content))
    results.send(outcomes)


def _shrink(target: Target, place: str, content: bytes, shared: _Shared, results: Any) -> None:
    """Remove parts, large ones first, as long as the finding stays the same."""
    ends, size, number = time.monotonic() + _SHRINK_SECONDS, len(content) // 2, 0
    while size and time.monotonic() < ends:
        start, before = 0, len(content)
        while start < len(content) and time.monotonic() < ends:
            shorter, number = content[:start] + content[start + size :], number + 1
            shared.note(number, shorter)
            _allow_seconds()
            if examine(target, shorter).place == place:
                content = shorter
            else:
                start += size
        size = size // 2 if len(content) == before or size > len(content) else size
    results.send(content)


@dataclass
class _Worker:
    """A forked worker process."""

    target: Target
    numbers: range
    shared: _Shared
    process: Any
    results: Connection
    started: float = field(default_factory=time.monotonic)
    seen: int = -1  # number of its current execution ...
    seen_at: float = field(default_factory=time.monotonic)  # ... and when it started

    def is_stuck(self) -> bool:
        number = self.shared.read()[0]
        if number != self.seen:
            self.seen, self.seen_at = number, time.monotonic()
        return time.monotonic() - self.seen_at > _WAIT_SECONDS

    def death(self) -> str:
        """The fault that ended the worker."""
        code = self.process.exitcode
        if code == -signal.SIGXCPU:
            return f"hang: more than {HANG_SECONDS} s of processor time"
        if code == -signal.SIGKILL:
            return f"hang: no end within {_WAIT_SECONDS} s"
        return f"native crash: {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _fork(target: Target, folder: Path, work: Callable[..., None], *arguments: Any, numbers: range) -> _Worker:
    shared = _Shared()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    run = lambda: _in_scratch(target, folder, lambda: work(target, *arguments, shared, sender))  # noqa: E731
    process = context.Process(target=run)
    process.start()
    sender.close()
    return _Worker(target, numbers, shared, process, receiver)


def _result(worker: _Worker) -> Any:
    """The result of a worker that has ended; None if it was killed."""
    with contextlib.suppress(EOFError, OSError):
        if worker.results.poll():
            return worker.results.recv()
    return None


class Fuzzer:
    """Fuzzes some targets. Call `close` at the end."""

    def __init__(self, targets: Sequence[Target], seed: int = 0, jobs: int = 1) -> None:
        self.targets, self.seed, self.jobs = list(targets), seed, jobs
        shm = Path("/dev/shm")
        self._root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shm if os.access(shm, os.W_OK) else None))
        self.seeds = {target.name: self._seeds(target) for target in self.targets}
        self.tallies = {target.name: Tally() for target in self.targets}

    def close(self) -> None:
        shutil.rmtree(self._root)

    def _folder(self, target: Target) -> Path:
        folder = self._root / target.name / "project"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _seeds(self, target: Target) -> list[bytes]:
        """In another process, because forks would lack the threads that a library starts in this one."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        work = lambda: sender.send(target.make(self._folder(target)))  # noqa: E731
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        sender.close()
        seeds: list[bytes] = receiver.recv()
        process.join()
        return seeds

    def run(self, executions: int, seconds: float | None = None) -> None:
        """Run so many executions, divided among the targets by their shares; fewer if the time is over."""
        ends, total = time.monotonic() + (seconds or 1e9), sum(target.share for target in self.targets)
        waiting = self._chunks({t.name: max(1, executions * t.share // total) for t in self.targets})
        workers: list[_Worker] = []
        again: list[tuple[Target, range]] = []  # the rest of chunks whose worker died
        printed = time.monotonic()
        while True:
            if time.monotonic() > printed + PROGRESS_SECONDS:
                printed = time.monotonic()
                done = sum(tally.executions for tally in self.tallies.values())
                print(f"{done:,} of {executions:,} executions", file=sys.stderr, flush=True)
            while len(workers) < self.jobs and time.monotonic() < ends:
                if (task := again.pop() if again else next(waiting, None)) is None:
                    break
                target, numbers = task
                arguments = (self.seeds[target.name], self.seed, numbers)
                workers.append(_fork(target, self._folder(target), _chunk, *arguments, numbers=numbers))
            if not workers:
                return
            time.sleep(0.01)
            for worker in list(workers):
                if worker.results.poll() or not worker.process.is_alive():
                    workers.remove(worker)
                    if (rest := self._note(worker)) and time.monotonic() < ends:
                        again.append((worker.target, rest))
                elif worker.is_stuck():
                    worker.process.kill()

    def _chunks(self, executions: dict[str, int]) -> Iterator[tuple[Target, range]]:
        """Chunks of the targets in turn, so that a run that is stopped early has tried each."""
        done = dict.fromkeys(executions, 0)
        while any(done[name] < n for name, n in executions.items()):
            for target in self.targets:
                start, n = done[target.name], executions[target.name]
                if start < n:
                    done[target.name] = min(n, start + max(50, CHUNK * target.share // 100))
                    yield target, range(start, done[target.name])

    def _note(self, worker: _Worker) -> range:
        """Add a worker's results; returns the executions that it did not reach."""
        result = _result(worker)
        worker.process.join()
        tally, numbers = self.tallies[worker.target.name], worker.numbers
        tally.seconds += time.monotonic() - worker.started
        if result is not None:
            figures, n = result
            tally.executions += n
            tally.rejected += figures.rejected
            tally.peak, tally.slowest = max(tally.peak, figures.peak), max(tally.slowest, figures.slowest)
            for place, found in figures.findings.items():
                tally.findings.setdefault(place, found)
            return numbers[n:]
        number, content = worker.shared.read()
        n = number - numbers[0] + 1
        tally.executions += n
        fault = worker.death()
        if worker.target.guarded and fault.startswith("native crash"):
            tally.contained += 1
            fault = self.examine(worker.target, content, worker.target.guarded).fault
        if fault:
            tally.findings.setdefault(fault, (fault, content))
        return numbers[n:]

    def _finished(self, worker: _Worker) -> Any:
        """Wait for the end of a worker; returns its result, or None if it was killed."""
        while worker.process.is_alive() and not worker.results.poll(0.02):
            if worker.is_stuck():
                worker.process.kill()
        result = _result(worker)
        worker.process.join()
        return result

    def examine(
        self, target: Target, content: bytes, execute: Callable[[bytes], object] | None = None
    ) -> Outcome:
        """Execute one input in a separate worker."""
        worker = _fork(target, self._folder(target), _examine_one, content, execute, numbers=range(1))
        result = self._finished(worker)
        if result is not None:
            outcome: Outcome = result[0]
            return outcome
        fault = worker.death()
        if target.guarded and execute is None and fault.startswith("native crash"):
            return self.examine(target, content, target.guarded)
        return Outcome(fault, fault)

    def replay(self, target: Target, contents: Sequence[bytes]) -> list[Outcome]:
        """Execute inputs in one worker, or each in a separate one if one of them kills it."""
        if not contents:
            return []
        worker = _fork(target, self._folder(target), _replay, contents, numbers=range(len(contents)))
        outcomes: list[Outcome] | None = self._finished(worker)
        return outcomes or [self.examine(target, content) for content in contents]

    def shrunk(self, target: Target, place: str, content: bytes) -> bytes:
        """A shorter input with the same finding; the same input if shrinking kills the worker."""
        worker = _fork(target, self._folder(target), _shrink, place, content, numbers=range(1))
        shorter: bytes | None = self._finished(worker)
        return content if shorter is None else shorter

    def save(self, folder: Path) -> list[str]:
        """Write the findings, shrunk, into `folder`, a folder for each target; returns a line for each."""
        lines = []
        for target in self.targets:
            for place, (fault, content) in sorted(self.tallies[target.name].findings.items()):
                small = self.shrunk(target, place, content)
                path = folder / target.name / hashlib.sha256(small).hexdigest()[:12]
                if len(small) <= _LONGEST_KEPT:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(small)
                lines.append(f"{target.name}: {fault}; {place}; {len(small)} bytes, {path.name}")
        return lines

    def table(self) -> str:
        """The statistics as a Markdown table."""
        heads = (
            "target",
            "executions",
            "rejected",
            "findings",
            "crashes contained",
            "peak memory (limit), MiB",
        )
        heads += ("slowest, s", "executions/s")
        rows = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        for target in self.targets:
            t = self.tallies[target.name]
            memory = f"{t.peak >> 20} ({target.memory >> 20})"
            rows.append(
                f"| {target.name} | {t.executions:,} | {t.rejected:,} | {len(t.findings)} | {t.contained} "
                f"| {memory} | {t.slowest:.2f} | {t.executions / max(t.seconds, 1e-9):,.0f} |"
            )
        tallies = self.tallies.values()
        n, found = sum(t.executions for t in tallies), sum(len(t.findings) for t in tallies)
        rows.append(f"| all | {n:,} | {sum(t.rejected for t in tallies):,} | {found} | | | | |")
        return "\n".join(rows)

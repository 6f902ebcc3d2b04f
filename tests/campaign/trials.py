"""One function for each kind of trial: a fault, a rerun, and the differences from an undisturbed run.

A trial is a plain dict, so that it can be logged and repeated:

    {"kind": "kill", "stage": "train", "at": 37, "signals": ["SIGKILL"]}
"""

import random
import re
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign.checks import (
    CODES,
    Recorded,
    artefacts,
    broken_promises_of_an_end,
    broken_promises_of_files,
    broken_promises_of_the_record,
    leftovers,
    unsound,
)
from campaign.damage import damage
from campaign.faults import Fault, read_trace
from campaign.powercut import Record, cut_power
from campaign.project import (
    SAVE_EVERY,
    STAGES,
    Ended,
    TinyProject,
    documents,
    import_pipeline,
    learn,
    remember_charts,
    remember_packages,
)

Trial = dict[str, Any]
# Files that each stage reads and must check. Stage evaluate also reads what stage train wrote to reports/.
READS = {
    "tokenize": ("data/raw",),
    "split": ("data/raw", "data/tokens"),
    "train": ("data/split",),
    "evaluate": (
        "models/gpt",
        "data/split",
        "data/raw/manifest.json",
        "reports/mlflow_run.json",
        "reports/train.json",
        "reports/train.samples.json",
        "reports/train.steps.csv",
        "reports/train.validations.csv",
    ),
}


@dataclass(frozen=True)
class Expected:
    """The results of an undisturbed run of a stage."""

    files: dict[str, str]
    record: Recorded
    left: frozenset[str]  # temporary files and folders, such as the checkpoint of a finished training


class Laboratory:
    """The tiny project before each stage, the results of an undisturbed run, and trials on it."""

    def __init__(self, folder: Path, last_stage: str = STAGES[-1]) -> None:
        """Stages after `last_stage` are not tried, and what only they need is not imported."""
        self.stages = STAGES[: STAGES.index(last_stage) + 1]
        import_pipeline(trains="train" in self.stages)
        self.project = TinyProject(folder)
        self.operations: dict[str, int] = {}  # of each stage
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, Expected] = {}  # after each stage
        self._build()

    def _build(self) -> None:
        """Run each stage undisturbed; train and evaluate twice, the first time to learn what they import."""
        project, learned = self.project, self.project.folder / "learned"
        self.optimizer_steps = 0
        for stage in self.stages:
            if stage == "train":
                project.save("train without a store")
                _demand(project.call("gptpipe.record.store", "connect"))
            project.save(stage)
            if stage in ("train", "evaluate"):
                _demand(project.run(stage, learned=learned))
                learn(learned)
                if stage == "train":
                    remember_packages()
                    remember_charts()
                project.restore(stage)
            ended = project.run(stage, Fault("cut"), trace=True)  # at operation 0, which means never
            _demand(ended)
            if stage == "train":
                training = read_trace(project.trace)
            self.operations[stage], self.seconds[stage] = ended.operations, ended.seconds
            self.optimizer_steps = max(self.optimizer_steps, ended.optimizer_steps)
            self.expected[stage] = Expected(
                artefacts(project.path), Recorded.read(project.path), leftovers(project.path)
            )
        project.save("done")
        if "train" in self.stages:
            self._build_rarer_states(training)

    def _build_rarer_states(self, training: list[Record]) -> None:
        """Save two more states: a training killed after its third checkpoint, and a record in the outbox."""
        project, third = self.project, f"step-{3 * SAVE_EVERY:08d}"
        named = next(i for i, (_, _, new_name, _) in enumerate(training, 1) if new_name.endswith(third))
        project.restore("train")
        project.run("train", Fault("signal", named + 4, ("SIGKILL",)))
        assert len(list(project.path.glob(".gptpipe/checkpoints/*/step-*"))) >= 2
        project.save("stopped training")
        project.restore("train")
        _demand(project.run("train", Fault("fail", 1, for_ever=True, only="commit")))
        project.save("waiting record")

    @property
    def older(self) -> Path:
        """The project of another run, with another corpus and other parameters; made when first needed."""
        folder = self.project.folder / "older"
        if not folder.exists():
            text = "\n\n\n".join(documents().split("\n\n\n")[:-1])
            older = TinyProject(folder, text, **{"tokenize.vocab_size": 290, "train.lr": 2e-2})
            for stage in self.stages[:4]:
                _demand(older.run(stage))
        return folder / "project"

    def try_out(self, trial: Trial) -> dict[str, Any]:
        """Run a trial; returns it with its `differences`. There should be none."""
        chance = random.Random(str(sorted(trial.items())))
        started = time.monotonic()
        try:
            differences = _KINDS[trial["kind"]](self, trial, chance)
        except TimeoutError as error:
            differences = [f"I5: {error}"]
        except Exception as error:  # a fault of the harness in one trial must not end the campaign
            traceback.print_exc()
            differences = [f"harness: {type(error).__name__}: {error}"]
        return {"trial": trial, "differences": differences, "seconds": round(time.monotonic() - started, 2)}

    def begin(self, trial: Trial) -> None:
        """Restore the state before the stage, without the outputs of the stage, which DVC removes."""
        self.project.restore(trial.get("state", trial["stage"]))
        self.project.remove_outs(trial["stage"])

    def rerun(self, stage: str) -> Ended:
        self.project.remove_outs(stage)
        return self.project.run(stage)

    def finish(self, stage: str, steps_before: int = 0, n_faults: int = 1) -> list[str]:
        """Rerun without a fault, and compare the result with that of an undisturbed run."""
        ended = self.rerun(stage)
        differences = [f"rerun: {broken}" for broken in broken_promises_of_an_end(ended, {0})]
        steps = steps_before + ended.optimizer_steps
        per_step = 2  # optimizers: Muon for matrices, AdamW for the rest
        if stage == "train" and steps > self.optimizer_steps + n_faults * SAVE_EVERY * per_step:
            differences.append(f"I7: {steps // per_step} optimizer steps in total: steps were trained twice")
        return differences + self.compare(stage)

    def compare(self, stage: str, left: frozenset[str] = frozenset()) -> list[str]:
        """The differences from the undisturbed run; files in `left` may be left behind."""
        expected = self.expected[stage]
        # The steps that are kept depend on where it was stopped; stage evaluate removes them.
        if stage == "train":
            left |= {name for name in leftovers(self.project.path) if re.search(r"/(step|best)-\d+$", name)}
        broken = broken_promises_of_files(self.project.path, expected.files, expected.left | left)
        return broken + broken_promises_of_the_record(self.project.path, expected.record)


def _demand(ended: Ended) -> None:
    if ended.code:
        raise RuntimeError(f"an undisturbed run ends with code {ended.code}: {ended.said}")


def kill(lab: Laboratory, trial: Trial, _: random.Random) -> list[str]:
    """Send signals at one operation, or some time after the start; with `again`, also during the rerun."""
    stage, signals = trial["stage"], tuple(trial["signals"])
    lab.begin(trial)
    differences, steps = [], 0
    faults = [trial["at"], *trial.get("again", [])]
    for i, at in enumerate(faults):
        if i:
            lab.project.remove_outs(stage)
        if isinstance(at, int):
            ended = lab.project.run(stage, Fault("signal", at, signals))
            was_hit = ended.operations >= at
        else:
            running = lab.project.start(stage)
            running.signal_after(at * lab.seconds[stage], *signals)
            ended = running.wait()
            was_hit = ended.code != 0
        steps += ended.optimizer_steps
        codes = set().union(*(CODES[name] for name in signals)) if was_hit else {0}
        if stage == "train" and "SIGKILL" not in signals:
            codes |= {0}  # after the last step there is nothing to stop, and the stage ends normally
        differences += broken_promises_of_an_end(ended, codes) + unsound(lab.project.path)
    return differences + lab.finish(stage, steps, len(faults))


def cut(lab: Laboratory, trial: Trial, chance: random.Random) -> list[str]:
    """Cut the power at one operation: what was not synced is lost, or kept in part, or reordered."""
    stage = trial["stage"]
    lab.begin(trial)
    before = lab.project.folder / "before the cut"
    if before.exists():
        shutil.rmtree(before)
    shutil.copytree(lab.project.path, before, symlinks=True)
    ended = lab.project.run(stage, Fault("cut", trial["at"]), trace=True)
    cut_power(lab.project.path, before, read_trace(lab.project.trace), trial["mode"], chance)
    differences = unsound(lab.project.path)
    return differences + lab.finish(stage, ended.optimizer_steps)


def fail(lab: Laboratory, trial: Trial, _: random.Random) -> list[str]:
    """Let one operation fail, or all from it on. If the store fails, a warning suffices: the record waits."""
    stage = trial["stage"]
    lab.begin(trial)
    fault = Fault(trial["how"], trial["at"], error=trial["error"], for_ever=trial.get("for_ever", False))
    ended = lab.project.run(stage, fault)
    differences = broken_promises_of_an_end(ended, {0, 5}) + unsound(lab.project.path)
    if ended.code or (stage == "evaluate" and "warning" in ended.said):
        return differences + lab.finish(stage, ended.optimizer_steps)
    if stage == "train":  # the next command that logs sends what waits
        sent = lab.project.call("gptpipe.record.run", "send_outbox")
        differences += broken_promises_of_an_end(sent, {0})
    # A disk that refuses to remove a temporary folder or a free lock: the next evaluation, or the doctor, does.
    refused = {
        name for name in leftovers(lab.project.path) if name.endswith((".registration.partial", ".lock"))
    }
    return differences + lab.compare(stage, frozenset(refused))


def damaged(lab: Laboratory, trial: Trial, chance: random.Random) -> list[str]:
    """Damage a file that a stage reads. The stage exits with code 4, or the damage changes no result.

    After the file is restored, the result is that of an undisturbed run.
    """
    stage, name = trial["stage"], trial["file"]
    lab.begin(trial)
    path = lab.project.path / name
    good = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    if not damage(path, trial["way"], chance, lab.older / name if trial["way"] == "stale" else None):
        return []
    ended = lab.project.run(stage)
    differences = broken_promises_of_an_end(ended, {0, 4})
    if ended.optimizer_steps and ended.code:
        differences.append(f"I5: {ended.optimizer_steps} optimizer steps on damaged data")
    if ended.code == 4 and path.name not in ended.said and str(Path(name).parent) not in ended.said:
        differences.append(f"I5: the message does not name the file: {ended.said.strip()[-200:]}")
    path.with_name(f"copy-of-{path.name}").unlink(missing_ok=True)
    for file, content in good.items():
        file.write_bytes(content)
    if ended.code == 0:
        return [*differences, *(f"believed: {broken}" for broken in lab.compare(stage))]
    if chance.random() < 0.25:  # only what the failed run left could make a difference
        return differences + lab.finish(stage)
    left = leftovers(lab.project.path) - leftovers(lab.project.states / stage)
    return differences + [f"I4: left behind: {name}" for name in sorted(left)[:5]]


def leftover(lab: Laboratory, trial: Trial, chance: random.Random) -> list[str]:
    """Kill a stage and damage a file that it left to resume from. The rerun detects it."""
    stage = trial["stage"]
    lab.begin(trial)
    if "at" in trial:
        lab.project.run(stage, Fault("signal", trial["at"], ("SIGKILL",)))
    files = [
        path
        for path in sorted(lab.project.path.rglob("*"))
        if path.is_file() and (".partial" in str(path) or ".gptpipe/checkpoints" in str(path))
    ]
    files = [path for path in files if path.name != "lock"]
    if not files:
        return []
    for path in [chance.choice(files)] if trial["way"] != "all" else files:
        damage(path, trial["way"] if trial["way"] != "all" else "cut", chance)
    ended = lab.rerun(stage)
    differences = broken_promises_of_an_end(ended, {0, 4})
    if ended.code == 4:  # no checkpoint is sound: the message says to remove the folder, which starts a new run
        shutil.rmtree(lab.project.path / ".gptpipe/checkpoints")
        differences += broken_promises_of_an_end(lab.rerun(stage), {0})
        return differences + broken_promises_of_files(
            lab.project.path, lab.expected[stage].files, lab.expected[stage].left
        )
    return differences + lab.compare(stage)


def outbox(lab: Laboratory, trial: Trial, chance: random.Random) -> list[str]:
    """Damage the record of a training in the outbox. The next command that logs names the file."""
    lab.begin({"stage": "evaluate", "state": "waiting record"})
    (path,) = (lab.project.path / ".gptpipe/outbox").rglob("*.jsonl")
    if not damage(path, trial["way"], chance):
        return []
    ended = lab.project.run("evaluate")
    differences = broken_promises_of_an_end(ended, {0, 4})
    is_named = path.name in ended.said or path.stem in ended.said
    # An edit may change a number that nothing protects.
    if not is_named and trial["way"] not in ("gone", "edit"):
        differences.append(f"I5: nothing names the damaged record: {ended.said.strip()[-200:]}")
    return differences + unsound(lab.project.path)


def race(lab: Laboratory, trial: Trial, _: random.Random) -> list[str]:
    """Stop a stage at one operation, start the same stage a second time, then let the first one continue.

    The second one does the work, or names the first one within 5 s. In both cases the result is that of one
    run.
    """
    stage = trial["stage"]
    lab.begin(trial)
    first = lab.project.start(stage, Fault("signal", trial["at"], ("SIGSTOP",)))
    is_held = first.wait_until_stopped()
    locks = [*lab.project.path.rglob(".*.lock")]
    is_named = all(lock.read_text() for lock in locks)  # otherwise it was stopped before it wrote its name
    second = lab.project.start(stage).wait(reap_all=False)
    if is_held:
        first.go_on()
    ends = [first.wait(), second]
    differences = [broken for ended in ends for broken in broken_promises_of_an_end(ended, {0, 5})]
    if all(ended.code for ended in ends):
        differences.append("I4: neither of two runs ended well")
    if second.code == 5 and second.seconds > 5 + lab.seconds[stage]:
        differences.append(f"I4: the second writer waited {second.seconds:.1f} s")
    if second.code == 5 and is_named and str(first.pid) not in second.said:
        differences.append(f"I4: the second writer does not name the first: {second.said.strip()[-200:]}")
    return differences + lab.compare(stage)


_KINDS: dict[str, Callable[[Laboratory, Trial, random.Random], list[str]]] = {
    "kill": kill,
    "cut": cut,
    "fail": fail,
    "damage": damaged,
    "leftover": leftover,
    "outbox": outbox,
    "race": race,
}


def files_read(project: Path, stage: str) -> list[str]:
    """The files that a stage reads, in the state before it."""
    paths = [project / name for name in READS[stage]]
    files = [
        file
        for path in paths
        for file in ([path] if path.is_file() else sorted(path.rglob("*")))
        if file.is_file()
    ]
    return [file.relative_to(project).as_posix() for file in files]

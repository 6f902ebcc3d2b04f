"""The trials of a campaign: first every operation of every stage, then random choices."""

import random
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from typing import Any

from campaign.damage import WAYS
from campaign.powercut import MODES

Trial = dict[str, Any]
_SIGNALS = (["SIGKILL"], ["SIGTERM"], ["SIGINT"], ["SIGTERM", "SIGTERM"], ["SIGINT", "SIGINT"])


def plan(hello: dict[str, Any], counts: dict[str, int], only: set[str], seed: int) -> list[Trial]:
    """`counts[kind]` trials of each kind, for the stages and kinds in `only` (all if it is empty).

    `hello` is the first answer of a worker: the number of operations of each stage, and the files that it
    reads.
    """
    chance = random.Random(seed)
    makers = {
        "kill": _kills,
        "cut": _cuts,
        "fail": _failures,
        "damage": _damages,
        "leftover": _leftovers,
        "race": _races,
    }
    stages = [stage for stage in hello["operations"] if not only & hello["operations"].keys() or stage in only]
    kinds = [kind for kind in makers if not only & makers.keys() or kind in only]
    hello = {
        **hello,
        "operations": {stage: hello["operations"][stage] for stage in stages},
        "reads": {stage: files for stage, files in hello["reads"].items() if stage in stages},
    }
    trials = [list(islice(makers[kind](hello, chance), counts.get(kind, 0))) for kind in kinds]
    return [trial for several in zip_longest(*trials) for trial in several if trial is not None]


def _kills(hello: dict[str, Any], chance: random.Random) -> Iterator[Trial]:
    """Of five: three SIGKILL and one other signal at an operation, one signal at a random time or twice."""
    at_operations = _everywhere(hello, chance)
    others = _everywhere(hello, chance)
    stages = [*hello["operations"]]
    while True:
        for stage, at in islice(at_operations, 3):
            yield {"kind": "kill", "stage": stage, "at": at, "signals": ["SIGKILL"]}
        stage, at = next(others)
        yield {"kind": "kill", "stage": stage, "at": at, "signals": chance.choice(_SIGNALS[1:])}
        stage = chance.choice(stages)
        if chance.random() < 0.5:
            time = round(chance.uniform(0, 1.05), 3)  # as a fraction of the time of an undisturbed run
            yield {"kind": "kill", "stage": stage, "at": time, "signals": chance.choice(_SIGNALS)}
        else:
            first, second = (chance.randint(1, hello["operations"][stage]) for _ in range(2))
            state = {"state": "train without a store"} if stage == "train" and chance.random() < 0.5 else {}
            yield {
                "kind": "kill",
                "stage": stage,
                "at": first,
                "again": [second],
                "signals": ["SIGKILL"],
                **state,
            }


def _cuts(hello: dict[str, Any], chance: random.Random) -> Iterator[Trial]:
    for stage, at in _everywhere(hello, chance):
        yield {"kind": "cut", "stage": stage, "at": at, "mode": chance.choice(MODES)}


def _failures(hello: dict[str, Any], chance: random.Random) -> Iterator[Trial]:
    for stage, at in _everywhere(hello, chance):
        error, how = chance.choice(["ENOSPC", "EIO"]), chance.choice(["fail", "fail", "short"])
        for_ever = {"for_ever": True} if how == "fail" and chance.random() < 0.5 else {}
        yield {"kind": "fail", "stage": stage, "at": at, "how": how, "error": error, **for_ever}


def _damages(hello: dict[str, Any], chance: random.Random) -> Iterator[Trial]:
    """Every file in every way, repeatedly: bit flips and cuts have another place each time."""
    number = 0
    while hello["reads"]:
        all_of_them = [
            (stage, name, way)
            for stage, names in hello["reads"].items()
            for name in names
            for way in WAYS
            if (name, way) != ("reports/mlflow_run.json", "stale")  # any valid run id is accepted there
        ]
        chance.shuffle(all_of_them)
        for stage, name, way in all_of_them:
            number += 1
            yield {"kind": "damage", "stage": stage, "file": name, "way": way, "number": number}


def _leftovers(hello: dict[str, Any], chance: random.Random) -> Iterator[Trial]:
    places = [stage for stage in hello["operations"] if stage in ("collect", "tokenize", "train")]
    if "train" in places:  # a training makes the record
        places.append("outbox")
    number = 0
    while places:
        number += 1
        stage = chance.choice(places)
        way = chance.choice(("flip", "cut", "empty", "zeros", "gone", "all"))
        if stage == "outbox":
            way = chance.choice(("flip", "cut", "empty", "zeros", "edit"))
            yield {"kind": "outbox", "stage": "evaluate", "way": way, "number": number}
        elif stage == "train":
            yield {
                "kind": "leftover",
                "stage": stage,
                "state": "stopped training",
                "way": way,
                "number": number,
            }
        else:
            at = chance.randint(1, hello["operations"][stage])
            yield {"kind": "leftover", "stage": stage, "at": at, "way": way, "number": number}


def _races(hello: dict[str, Any], chance: random.Random) -> Iterator[Trial]:
    for stage, at in _everywhere(hello, chance):
        yield {"kind": "race", "stage": stage, "at": at}


def _everywhere(hello: dict[str, Any], chance: random.Random) -> Iterator[tuple[str, int]]:
    """Every operation of every stage in random order, repeatedly."""

    def of_stage(stage: str, n: int) -> list[tuple[str, int]]:
        return [(stage, at) for at in chance.sample(range(1, n + 1), n)]

    while True:
        orders = [of_stage(stage, n) for stage, n in hello["operations"].items()]
        mixed = list(chain.from_iterable(orders))
        chance.shuffle(mixed)
        yield from mixed

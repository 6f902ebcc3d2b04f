"""The same targets, guided by coverage: atheris instruments gptpipe's bytecode, libFuzzer chooses inputs.

libFuzzer ends the process at the first finding, so this is for one target at a time:
`--coverage --target jsonl`. What it finds and cannot explain by an exception of the target's list, it saves and
prints.
"""

import os
import tempfile
from pathlib import Path
from random import Random


def fuzz(name: str, *, executions: int, seconds: float | None, seed: int) -> None:
    """Fuzz targets. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["gptpipe"]):
        from .engine import LONGEST, examine
        from .mutations import mutate
        from .targets import TARGETS
    target = next(target for target in TARGETS if target.name == name)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    seeds = target.make(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, content in enumerate(seeds):
        (corpus / str(i)).write_bytes(content)
    os.chdir(folder)

    def execute(content: bytes) -> None:
        outcome = examine(target, content)
        if outcome.fault:
            raise AssertionError(f"finding: {outcome.fault}; {outcome.place}")

    def mutator(content: bytes, longest: int, number: int) -> bytes:
        if number % 2:
            return bytes(atheris.Mutate(content, longest))
        return mutate(content, seeds, target.mutations, Random(number))[:longest]

    limits = [
        f"-runs={executions}",
        f"-max_total_time={round(seconds or 0)}",
        f"-seed={seed + 1}",
        "-timeout=5",
        f"-max_len={LONGEST}",
        f"-rss_limit_mb={4096}",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup(["fuzz", *limits, str(corpus)], execute, custom_mutator=mutator)
    atheris.Fuzz()

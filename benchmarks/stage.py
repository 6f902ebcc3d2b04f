"""Runs one stage of the data plane in this process, for `benchmarks.data_plane`: `python -m benchmarks.stage`.

Worker processes are used whatever the size of the text, as for a large corpus.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from gptpipe.base import manifest
from gptpipe.collect import collect as collecting
from gptpipe.collect import parts
from gptpipe.collect.params import CollectParams
from gptpipe.params import load_params
from gptpipe.shell.environment import n_workers
from gptpipe.split import overlap
from gptpipe.split import split as splitting
from gptpipe.tokenize import encode

RAW, TOKENS, SPLIT, TEXTS = "raw", "tokens", "split", "texts"


def run_stage(stage: str, folder: Path, encoding: str, dedup: str) -> None:
    """Run a stage; its input and output are folders below `folder`."""
    params = load_params()
    raw, tokens, split = folder / RAW, folder / TOKENS, folder / SPLIT
    match stage:
        case "collect":
            source = {"kind": "jsonl", "paths": (f"{folder / TEXTS}/*.jsonl",)}
            changes = {"sources": (source,), "dedup": dedup, "min_document_bytes": 1}
            collecting.collect(CollectParams.model_validate(params.collect.model_dump() | changes), raw)
        case "tokenize":
            section = params.tokenize.model_copy(update={"encoding": encoding})
            encode.tokenize(raw, tokens, section, params.split.fractions, params.seed)
        case "split":
            overlap.report_contamination(
                raw, folder / "overlap.json", params.split, params.collect, params.seed, {}
            )
            splitting.split(tokens, split, params.split, params.seed)


def main() -> None:
    """Print the seconds of the stage, without imports: wall time, and CPU time of this process."""
    always: dict[Any, str] = {collecting: "_MANY_BYTES", encode: "_SMALL_BYTES", overlap: "_SMALL_BYTES"}
    always |= {splitting: "_SMALL_BYTES", manifest: "_SMALL_BYTES", parts: "_HASHED_HERE"}
    if n_workers() > 1:
        for module, name in always.items():
            assert hasattr(module, name)
            setattr(module, name, 0)
    stage, folder, encoding, dedup = sys.argv[1:]
    cpu, wall = _cpu_seconds(), time.perf_counter()
    run_stage(stage, Path(folder), encoding, dedup)
    print(json.dumps({"wall": time.perf_counter() - wall, "parent": _cpu_seconds() - cpu}))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()

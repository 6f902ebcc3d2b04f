"""Memory of tokenize and split: ten times the text needs at most a tenth more."""

import subprocess
import sys
from pathlib import Path

import pytest
from sections import SHIPPED

from gptpipe.collect import shards
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams

PROGRAM = """
import sys
from pathlib import Path
from gptpipe.base import parquet
from gptpipe.params import load_params
from gptpipe.split import overlap
from gptpipe.split.overlap import report_contamination
from gptpipe.tokenize.encode import tokenize
from gptpipe.split.split import split
params, folder = load_params(), Path(sys.argv[2])
parquet._GROUP_BYTES, overlap._MAX_RUNS = 1 << 18, 1 << 15  # so that a small corpus is many times as much
if sys.argv[1] == "tokenize":
    gpt2 = params.tokenize.model_copy(update={"encoding": "gpt2"})
    tokenize(folder / "raw", folder / "tokens", gpt2, params.split.fractions, 0)
else:
    report_contamination(folder / "raw", folder / "split.json", params.split, params.collect, 0, {})
    split(folder / "tokens", folder / "split", params.split, 0)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 19)
    peaks: dict[str, list[int]] = {"tokenize": [], "split": []}
    for n_documents in (2_500, 25_000):
        folder = tmp_path / str(n_documents)
        folder.mkdir()
        with (folder / "lines.txt").open("w") as file:
            file.writelines(
                f"{i} " + " ".join(f"w{i * j % 9973}" for j in range(150)) + "\n" for i in range(n_documents)
            )
        source = {"kind": "text", "paths": (f"{folder}/lines.txt",), "document": "line"}
        params = CollectParams.model_validate({**dict(SHIPPED.collect), "dedup": "exact", "sources": (source,)})
        collect(params, folder / "raw")
        for stage, peaks_of_stage in peaks.items():
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, stage, folder],
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                check=True,
            )
            peaks_of_stage.append(int(done.stdout))
    for small, large in peaks.values():
        assert large <= 1.1 * small

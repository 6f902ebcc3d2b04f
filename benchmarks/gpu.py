"""GPT-2's 124M shape on a GPU: a table of training steps, then ten minutes of training with its curve.

    python -m benchmarks.gpu [--seconds 600] [--peak 989e12]
    python -m benchmarks.gpu --rehearse        # a small shape on a CPU, to check that everything works

Steps have context 1,024, in bfloat16, compiled, beside `transformers` and a plain loop. The share is MFU: model
FLOPs relative to --peak, the device's dense bfloat16 FLOP/s (default: an H100 or H200). The training runs
`dvc repro` stage by stage in a copy of the project, on the source code of Python and of the installed packages,
with GPT-2's encoding. Writes benchmarks/results/gpu.md and gpu.svg; a rehearsal writes nothing.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from ruamel.yaml import YAML

from benchmarks import machine
from benchmarks.default_run import ROOT, copy_project
from benchmarks.training_speed import HEAD, SHAPES, compare
from gptpipe.evaluate.charts import line_chart

GPT2 = (12, 12, 768, 1024, 16, 50304)  # as nanoGPT has it, its vocabulary a multiple of 64
PACKAGES = (None, "torch", "transformers", "pandas", "mlflow", "sklearn", "sympy", "scipy", "dvc", "ray")
STAGES = ("collect", "tokenize", "split", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, about")
    parser.add_argument("--peak", type=float, default=989e12, help="dense bfloat16 FLOP/s of the device")
    parser.add_argument("--rehearse", action="store_true", help="a small shape on the CPU; two minutes")
    options = parser.parse_args()
    device = torch.device("cpu" if options.rehearse else "cuda")
    name, seconds, peak = ("0.8M", 1.0, 0.0) if options.rehearse else ("124M", options.seconds, options.peak)
    shape = SHAPES.get(name, GPT2)
    page = io.StringIO()
    with redirect_stdout(page):
        print(f"# Measured on a GPU\n\n{machine.describe()}\n\n{HEAD}")
        rate = compare(name, shape, device, 5, peak=peak)["gpt2: gptpipe"]
        with tempfile.TemporaryDirectory() as folder:
            curve = train(Path(folder), shape, int(seconds * rate), options.rehearse)
        print(f"\n{seconds:.0f} seconds of training:\n\n{curve.to_markdown(index=False)}\n\n![loss](gpu.svg)")
    print(page.getvalue())
    if not options.rehearse:
        results = ROOT / "benchmarks/results"
        losses = {"train": "train_loss", "validation": "val_loss"}
        series = {name: (curve["step"].tolist(), curve[column].tolist()) for name, column in losses.items()}
        (results / "gpu.md").write_text(page.getvalue())
        (results / "gpu.svg").write_text(line_chart("step", "nats per token", series))


def train(folder: Path, shape: tuple[int, ...], n_tokens: int, is_small: bool) -> pd.DataFrame:
    """Train on about `tokens` tokens; returns the validations."""
    n_layer, n_head, width, context, batch_size, _ = shape
    project = copy_project(folder)
    path, yaml = project / "params.yaml", YAML()
    params: dict[str, Any] = yaml.load(path)
    packages = PACKAGES[:1] if is_small else PACKAGES
    params["collect"]["sources"] = [{"kind": "python-code", "package": package} for package in packages]
    params["tokenize"]["encoding"] = "gpt2"
    params["split"] |= {"val_fraction": 0.01, "test_fraction": 0.0}
    params["model"] |= {
        "architecture": "gpt2",
        "context_length": context,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_head,
        "n_embd": width,
        "n_inner": 4 * width,
        "tie_embeddings": True,
    }
    batch_size *= 1 if is_small else 16  # a quarter of a million tokens a step
    n_steps = max(20, n_tokens // (batch_size * context))
    params["train"] |= {
        "optimizer": "adamw",
        "lr": 6e-4,
        "schedule": "cosine",
        "warmup_steps": n_steps // 10,
        "batch_size": batch_size,
        "stride": context,
        "max_steps": n_steps,
        "eval_every": max(1, n_steps // 10),
        "save_every": n_steps,
    }
    yaml.dump(params, path)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}"}
    for stage in STAGES:
        command = [sys.executable, "-m", f"stages.{stage}"]
        subprocess.run(command, cwd=project, check=True, stdout=sys.stderr, env=environment)
    return pd.read_csv(project / "reports/train.validations.csv")


if __name__ == "__main__":
    main()

"""evaluate: what the model is worth on the validation and test splits; registers it."""

import json
from pathlib import Path

from gptpipe.config import load_params
from gptpipe.console import say
from gptpipe.stage import run_stage


def main() -> None:
    params = load_params()
    from gptpipe.evaluation.evaluate import evaluate_model  # late: bad parameters are told before the slow imports
    from gptpipe.tracking.registry import record_evaluation

    model, reports = Path("models/gpt"), Path("reports")
    found = evaluate_model(model, Path("data/split"), reports, params.evaluate, params.seed)
    champion = record_evaluation(
        params,
        found.lineage,
        json.loads((reports / "mlflow_run.json").read_bytes())["run_id"],
        step=found.step,
        metrics=found.metrics(),
        texts={"samples.md": found.samples, "model_card.md": found.card},
        card=found.card,
        test_digest=found.results["test_digest"],
        model=model,
    )
    for side in ("val", "test"):
        if side in found.results:
            figures, xz = found.results[side], found.results["reference_bits_per_byte"][side]["xz"]
            bits = f"{figures['bits_per_byte']:.4f} ± {figures['bits_per_byte_standard_error']:.4f} bits per byte"
            say(f"evaluate: {side} {bits} (xz -9e: {xz:.4f}), perplexity {figures['perplexity']:.2f}")
    say(f"evaluate: {champion}")


if __name__ == "__main__":
    run_stage(main, __doc__)

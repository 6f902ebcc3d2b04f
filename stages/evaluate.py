"""evaluate: measure the model on the validation and test documents, and register it."""

from pathlib import Path

from gptpipe.shell.process import run_stage


def main() -> None:
    from gptpipe.base.manifest import check_parent, read_manifest
    from gptpipe.params import load_params
    from gptpipe.shell.console import say
    from gptpipe.shell.environment import project_root

    params = load_params()
    from gptpipe.base.finished_training import discard_finished
    from gptpipe.evaluate.evaluate import evaluate_model  # late: fail on bad parameters before the slow imports
    from gptpipe.evaluate.registry import record_evaluation
    from gptpipe.evaluate.report import draw_figures, read_training_reports, write_page
    from gptpipe.record.store import read_run_id

    raw = Path("data/raw")
    split = Path("data/split")
    model = Path("models/gpt")
    reports = Path("reports")
    run_id = read_run_id(reports / "mlflow_run.json")
    trained = read_training_reports(reports, model)
    check_parent(split, raw)
    evaluation = evaluate_model(model, split, reports, params.evaluate, params.seed)
    charts = draw_figures(reports, trained)
    page = write_page(reports, trained, params, evaluation.lineage, read_manifest(raw).counts, run_id, charts)
    champion = record_evaluation(params, params.evaluate, evaluation, run_id, page, charts, model)
    discard_finished(project_root() / ".gptpipe" / "checkpoints", run_id)  # DVC has recorded the training
    for side in ("val", "test"):
        if side in evaluation.results:
            result = evaluation.results[side]
            xz = evaluation.results["reference_bits_per_byte"][side]["xz"]
            bits = f"{result['bits_per_byte']:.4f} ± {result['bits_per_byte_standard_error']:.4f} bits per byte"
            say(f"evaluate: {side} {bits} (xz -9e: {xz:.4f}), perplexity {result['perplexity']:.2f}", "quiet")
    say(f"evaluate: {champion}", "quiet")


if __name__ == "__main__":
    run_stage("evaluate", main, __doc__)

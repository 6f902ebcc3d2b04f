"""evaluate: measure the model on the validation and test splits, write the report, and register the model."""

from pathlib import Path

from gptpipe.shell.process import run_stage


def main() -> None:
    from gptpipe.base.manifest import check_parent, read_manifest
    from gptpipe.params import load_params
    from gptpipe.shell.console import say
    from gptpipe.shell.environment import project_root

    params = load_params()  # before the slow imports, so that bad parameters fail early
    from gptpipe.base.finished_training import discard_finished
    from gptpipe.evaluate.champion import compare_with_champion
    from gptpipe.evaluate.comparable_runs import comparable_runs
    from gptpipe.evaluate.compared_metrics import write_compared_metrics
    from gptpipe.evaluate.evaluate import evaluate_model
    from gptpipe.evaluate.model_card import write_model_card
    from gptpipe.evaluate.registry import record_evaluation
    from gptpipe.evaluate.report import draw_charts, read_training_reports, write_report
    from gptpipe.evaluate.training_cost import training_cost
    from gptpipe.model.hf_config import with_shape_of

    raw, split, model = Path("data/raw"), Path("data/split"), Path("models/gpt")
    if params.train.init_from is not None:  # the shape of the model is that of the one it started from
        params = params.starting_from(params.train.init_from, with_shape_of(params.model, model))
    reports = Path("reports")
    training = read_training_reports(reports, model)
    check_parent(split, raw)

    evaluation = evaluate_model(model, split, reports, params.evaluate, params.seed)
    write_compared_metrics(reports, evaluation.results, training)
    run_id = training.run_id
    card = write_model_card(reports, model, params.collect.sources, evaluation, training_cost(run_id))
    comparable = comparable_runs(params, evaluation.split, run_id, training.losses()["val"])
    charts, collected = draw_charts(reports, training, comparable), read_manifest(raw).counts
    champion = compare_with_champion(params, evaluation, run_id, training.losses(), model)
    page = write_report(reports, training, params, evaluation.split, collected, charts, champion, comparable)
    outcome = record_evaluation(params, params.evaluate, evaluation, run_id, card, page, charts, model)

    # After evaluate, DVC has recorded the outputs of train, so its finished checkpoint is not needed any more.
    discard_finished(project_root() / ".gptpipe" / "checkpoints", run_id)
    for line in (*evaluation.summary(), outcome):
        say(f"evaluate: {line}", "quiet")


if __name__ == "__main__":
    run_stage("evaluate", main, __doc__)

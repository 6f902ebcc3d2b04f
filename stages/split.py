"""split: assign whole documents to train, val and test, and write a token stream for each."""

from pathlib import Path

from gptpipe.shell.process import run_stage


def main() -> None:
    from gptpipe.base.manifest import check_parent
    from gptpipe.harness.tasks import texts_of_tasks
    from gptpipe.params import load_params
    from gptpipe.shell.console import say
    from gptpipe.split.overlap import report_contamination
    from gptpipe.split.split import split

    params = load_params()
    check_parent(Path("data/tokens"), Path("data/raw"))
    tasks = texts_of_tasks(params.evaluate.tasks, Path(params.evaluate.task_folder))
    overlapping = report_contamination(
        Path("data/raw"), Path("reports/split.json"), params.split, params.collect, params.seed, tasks
    )
    counts = split(Path("data/tokens"), Path("data/split"), params.split, params.seed)
    sides = [
        f"{side} {counts[f'{side}_documents']:,} documents, {counts[f'{side}_tokens']:,} tokens"
        for side in ("train", "val", "test")
    ]
    for line in (*overlapping, "; ".join(sides)):
        say(f"split: {line}", "quiet")


if __name__ == "__main__":
    run_stage("split", main, __doc__)

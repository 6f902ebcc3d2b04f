"""The command `gptpipe`: what people do before and after the pipeline."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gptpipe import __version__
from gptpipe.console import complain
from gptpipe.stage import run


def main() -> None:
    run(lambda: _dispatch(sys.argv[1:]))


def _dispatch(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="gptpipe", description="Before and after `dvc repro`, which trains a GPT from scratch."
    )
    parser.add_argument("--version", action="version", version=f"gptpipe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan", help="what the training of params.yaml will take, by a few steps on this machine"
    )
    plan.set_defaults(command=_plan)
    data = commands.add_parser("data", help="what the data is like so far; also in reports/data.md")
    data.add_argument("--seed", type=int, default=0, help="of the documents that are drawn")
    data.set_defaults(command=_data)
    generate = commands.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generate.add_argument("prompt", help="text to continue")
    generate.add_argument("--model", type=Path, default=Path("models/gpt"), help="model folder")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many tokens")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token, always")
    generate.add_argument("--top-k", type=int, default=50, help="draw from the k most probable tokens; 0 for all")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw from the tokens that make up this probability")
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    generate.set_defaults(command=_generate)
    compare = commands.add_parser("compare", help="table of runs: mean, standard error and significance over seeds")
    compare.add_argument("names", nargs="*", help="run ids, names, experiments or sweeps; none: all runs")
    compare.add_argument("--metric", default="test/bits_per_byte", help="default: test/bits_per_byte")
    compare.set_defaults(command=_compare)
    restore = commands.add_parser("restore", help="bring back a run's code, parameters, data and model in a new folder")
    restore.add_argument("run_id", help="as in reports/mlflow_run.json, `dvc exp show` and the MLflow UI")
    restore.add_argument("folder", type=Path, nargs="?", help="default: beside this project, with the run's id")
    restore.set_defaults(command=_restore)
    options = parser.parse_args(arguments)
    options.command(options)


def _plan(_: argparse.Namespace) -> None:
    from gptpipe.config import load_params

    params = load_params()
    from gptpipe.training.forecast import forecast  # late: importing torch takes seconds, bad parameters are told first

    found = forecast(params, Path("data/split"))
    for name, text in found.lines.items():
        print(f"{name + ':':<22}{text}")
    for warning in found.warnings:
        complain(f"warning: {warning}")


def _data(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from gptpipe.evaluation.data_view import view_data

    page, run = view_data(Path(), options.seed), Path("reports/mlflow_run.json")
    Console().print(Markdown(page))
    if run.exists():
        from gptpipe.tracking.store import RunWriter, connect, find_run  # seconds, which the page need not wait for

        if run_id := find_run(connect(), json.loads(run.read_bytes())["run_id"]):  # a fresh clone's store has none
            RunWriter(run_id).write(("text", ["data.md", page]))


def _generate(options: argparse.Namespace) -> None:
    from gptpipe.evaluation.continuations import continue_text  # late: --help must not wait for torch
    from gptpipe.files import verify
    from gptpipe.model.device import best_device
    from gptpipe.model.generate import Sampling
    from gptpipe.model.layout import load_model
    from gptpipe.tokens.tokenizer import Tokenizer

    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k or None, top_p=options.top_p, seed=options.seed
    )
    verify(options.model)
    model, tokenizer = load_model(options.model).to(best_device()), Tokenizer.load(options.model)
    print(options.prompt, end="", flush=True)
    for piece in continue_text(model, tokenizer, options.prompt, options.max_new_tokens, sampling):
        print(piece, end="", flush=True)
    print()


def _compare(options: argparse.Namespace) -> None:
    from gptpipe.tracking.compare import compare

    print(compare(options.names, options.metric))


def _restore(options: argparse.Namespace) -> None:
    from gptpipe.tracking.restore import restore

    beside = Path.cwd().resolve()
    restore(options.run_id, options.folder or beside.with_name(f"{beside.name}-{options.run_id[:8]}"))


if __name__ == "__main__":
    main()

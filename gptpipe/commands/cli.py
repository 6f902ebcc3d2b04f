"""The command `gptpipe`: one function per subcommand.

Each function imports what it needs, so that `--help` does not wait for torch or MLflow.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gptpipe import __version__
from gptpipe.shell.console import complain, printable
from gptpipe.shell.environment import is_project
from gptpipe.shell.errors import ConfigError
from gptpipe.shell.process import run

_DEFAULT_MODEL = Path("models/gpt")


def main() -> None:
    run(lambda: _dispatch(sys.argv[1:]))


_OTHER_COMMANDS = """\
other commands of the workflow:
  dvc repro                      run the stages whose inputs changed
  dvc exp run -S train.lr=1e-4   run a variation; --queue adds it to the queue
  dvc exp run --run-all -j 2     run the queued variations, two at a time
  dvc plots show                 show curves; `dvc plots diff` compares commits
  dvc push                       copy data and models to a remote
  dvc pull                       copy them back
  mlflow ui                      show runs, curves, samples, registered models

`gptpipe COMMAND --help` lists the options of a command. An error is one line.
Exit codes: 2 parameters, 3 input, 4 damaged artefact, 5 disk, memory, lock or
store, 6 loss not finite."""


def _dispatch(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    _enter_project(options)
    options.run(options)


def _enter_project(options: argparse.Namespace) -> None:
    """Change to the project's root, so that commands also work in its subfolders. Raises ConfigError.

    Paths that the user gave stay relative to the folder of the call. Outside a project, `generate` and `serve`
    work if they are given a model.
    """
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if is_project(folder)), None)
    paths = {name: value for name, value in vars(options).items() if isinstance(value, Path)}
    given = {name: path for name, path in paths.items() if path is not _DEFAULT_MODEL}
    models: list[Path | str] | None = getattr(options, "models", None)
    if root is None:
        if "model" in given or models:
            return
        raise ConfigError(
            f"{here}: neither this folder nor one above is a gptpipe project; change to one with `cd`"
        )
    if root != here:
        for name, path in given.items():
            setattr(options, name, here / path)
        if models:
            options.models = [here / model if isinstance(model, Path) else model for model in models]
        os.chdir(root)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of an option that has a value without being given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_value = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_value else action.help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptpipe",
        usage="gptpipe COMMAND [OPTION ...]",
        description="Train a GPT from scratch, reproducibly.",
        epilog=_OTHER_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gptpipe {__version__}")
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND", prog="gptpipe")

    def add_command(name: str, function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        """A subcommand whose help is the function's docstring."""
        command = commands.add_parser(
            name,
            help=function.__doc__,
            description=function.__doc__,
            formatter_class=_HelpFormatter,
        )
        command.set_defaults(run=function)
        return command

    plan = add_command("plan", _plan)
    plan.add_argument(
        "--minutes",
        type=float,
        help="propose a network and a training that take this time; without it, "
        "estimate the training that params.yaml describes",
    )

    data = add_command("data", _data)
    data.add_argument("--seed", type=int, default=0, help="seed that selects the random documents")

    doctor = add_command("doctor", _doctor)
    doctor.add_argument(
        "--fix",
        action="store_true",
        help="repair what can be repaired without loss: send waiting records, close runs without a process, "
        "remove leftovers of killed processes",
    )
    doctor.add_argument(
        "--remove-checkpoints",
        action="store_true",
        help="remove unfinished trainings that the present parameters do not continue; "
        "without it, they are listed",
    )

    compare = add_command("compare", _compare)
    compare.add_argument("names", nargs="*", help="run ids, run names, experiments or sweeps; default: all")
    compare.add_argument("--metric", default="test/bits_per_byte", help="a metric's name in MLflow")
    compare.add_argument("--curves", type=Path, help="draw the loss curves into this .html, .svg or .png file")

    generate = add_command("generate", _generate)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("prompt", nargs="?", help="text to continue")
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts until an empty line")
    generate.add_argument("--model", type=Path, default=_DEFAULT_MODEL, help="model folder")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="stop after this number of tokens")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    generate.add_argument(
        "--top-k", type=int, default=50, help="sample from the k most probable tokens; 0: all"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the fewest tokens with this total probability"
    )
    generate.add_argument(
        "--min-p", type=float, default=0.0, help="leave out tokens below this share of the largest probability"
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: tokens in the context become less probable",
    )
    generate.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")

    score = add_command("score", _score)
    score.add_argument("split", type=Path, nargs="?", default=Path("data/split"), help="folder with a split")
    score.add_argument("--model", type=Path, default=Path("models/gpt"), help="model folder")

    serve = add_command("serve", _serve)
    serve.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        type=_model,
        help=f"model folders, or models:/NAME@ALIAS; default: {_DEFAULT_MODEL}",
    )
    serve.add_argument("--host", default="127.0.0.1", help="for another one, set GPTPIPE_SERVE_KEY")
    serve.add_argument("--port", type=int, default=8000, help="port to listen at; 0: any free one")
    serve.add_argument("--max-tokens", type=int, default=4096, help="new tokens that a request may ask for")
    serve.add_argument("--timeout", type=float, default=300.0, help="seconds that a request may take")

    export = add_command("export", _export)
    export.add_argument("--format", choices=["gguf"], default="gguf", help="gguf: for llama.cpp and ollama")
    export.add_argument(
        "--type", choices=["f32", "f16", "q8_0"], default="f16", help="numbers of 32, 16 or 8.5 bits"
    )
    export.add_argument("--out", type=Path, help="file to write; without it, beside the model folder")
    export.add_argument("--model", type=Path, default=Path("models/gpt"), help="model folder")

    restore = add_command("restore", _restore)
    restore.add_argument("run_id", help="its first digits suffice; `dvc exp show` and the MLflow UI show it")
    restore.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="new folder; without it, beside this project with the run's id in its name",
    )
    return parser


def _model(text: str) -> Path | str:
    """A model folder, or the address of a model in the registry."""
    return text if text.startswith("models:") else Path(text)


def _plan(options: argparse.Namespace) -> None:
    """Estimate size, memory and time of a training, or propose one."""
    from gptpipe.params import load_params

    params = load_params()
    if options.minutes is not None:
        from gptpipe.commands.proposal import propose_training

        proposal = propose_training(params, Path("data/split"), options.minutes)
        _print_estimate(proposal.estimate.lines, proposal.estimate.warnings)
        print(f"dvc exp run {proposal.options}")
        return
    from gptpipe.commands.plan import estimate_training  # late: errors in params.yaml need not wait for torch
    from gptpipe.model.hf_config import with_shape_of
    from gptpipe.record.starting_model import starting_model

    with starting_model("train.init_from", params.train.init_from, Path("models/gpt")) as start:
        if start is not None:
            params = params.starting_from(start.name, with_shape_of(params.model, start.folder))
    estimate = estimate_training(params, Path("data/split"))
    _print_estimate(estimate.lines, estimate.warnings)


def _print_estimate(lines: Mapping[str, str], warnings: Sequence[str]) -> None:
    for name, text in lines.items():
        print(printable(f"{name + ':':<22}{text}"))
    for warning in warnings:
        complain(f"warning: {warning}")


def _data(options: argparse.Namespace) -> None:
    """Describe the collected text: lengths, sources, rejections."""
    from rich.console import Console
    from rich.markdown import Markdown

    from gptpipe.commands.data import log_page, write_page

    page = write_page(Path(), options.seed)
    Console().print(Markdown(printable(page)))
    log_page(page, Path("reports/mlflow_run.json"))


def _doctor(options: argparse.Namespace) -> None:
    """Check artefacts and records, and say how to fix problems."""
    from gptpipe.commands.doctor import doctor

    sys.exit(doctor(fix=options.fix, remove_checkpoints=options.remove_checkpoints))


def _compare(options: argparse.Namespace) -> None:
    """Compare runs over seeds: mean, standard error, significance."""
    from gptpipe.commands.compare import compare

    print(printable(compare(options.names, options.metric, options.curves)))


def _generate(options: argparse.Namespace) -> None:
    """Continue a prompt with a trained model."""
    from gptpipe.commands.generate import generate

    generate(options)


def _score(options: argparse.Namespace) -> None:
    """Print the loss of a model on the held-out text of a split."""
    from gptpipe.commands.score import score_split

    for line in score_split(options.model, options.split):
        print(printable(line))


def _serve(options: argparse.Namespace) -> None:
    """Serve models to OpenAI's clients and to a web page."""
    from gptpipe.commands.serve import serve

    serve(options)


def _export(options: argparse.Namespace) -> None:
    """Write a trained model as a file for llama.cpp."""
    from gptpipe.commands.export import export

    export(options)


def _restore(options: argparse.Namespace) -> None:
    """Restore code, parameters, data and model of a run."""
    from gptpipe.commands.restore import restore

    project = Path.cwd().resolve()
    beside = project.with_name(f"{project.name}-{options.run_id[:8]}")
    restore(options.run_id, options.folder or beside)


if __name__ == "__main__":
    main()

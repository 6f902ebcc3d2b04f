"""The command `gptpipe`: one function per subcommand.

Each function imports what it needs, so that `--help` does not wait for torch or MLflow.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gptpipe import __version__
from gptpipe.shell.console import complain, printable
from gptpipe.shell.process import run


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
    options.run(options)


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
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=function)
        return command

    add_command("plan", _plan)

    data = add_command("data", _data)
    data.add_argument("--seed", type=int, default=0, help="seed that selects the random documents")

    doctor = add_command("doctor", _doctor)
    doctor.add_argument(
        "--fix",
        action="store_true",
        help="repair what can be repaired without loss: send waiting records, close runs without a process, "
        "remove leftovers of killed processes",
    )

    compare = add_command("compare", _compare)
    compare.add_argument("names", nargs="*", help="run ids, run names, experiments or sweeps; default: all")
    compare.add_argument("--metric", default="test/bits_per_byte", help="a metric's name in MLflow")
    compare.add_argument("--curves", type=Path, help="draw the loss curves into this .html, .svg or .png file")

    generate = add_command("generate", _generate)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("prompt", nargs="?", help="text to continue")
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts until an empty line")
    generate.add_argument("--model", type=Path, default=Path("models/gpt"), help="model folder")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="stop after this number of tokens")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    generate.add_argument("--top-k", type=int, default=50, help="sample from the k most probable tokens; 0: all")
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the fewest tokens with this total probability"
    )
    generate.add_argument(
        "--min-p", type=float, default=0.0, help="leave out tokens below this share of the largest probability"
    )
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: tokens in the context become less probable"
    )
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")

    export = add_command("export", _export)
    export.add_argument("--format", choices=["gguf"], default="gguf", help="gguf: for llama.cpp and ollama")
    export.add_argument("--type", choices=["f32", "f16", "q8_0"], default="f16", help="numbers of 32, 16 or 8.5 bits")
    export.add_argument("--out", type=Path, help="file to write; without it, beside the model folder")
    export.add_argument("--model", type=Path, default=Path("models/gpt"), help="model folder")

    restore = add_command("restore", _restore)
    restore.add_argument("run_id", help="as in reports/mlflow_run.json, `dvc exp show` and the MLflow UI")
    restore.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="new folder; without it, beside this project with the run's id in its name",
    )
    return parser


def _plan(_: argparse.Namespace) -> None:
    """Estimate size, memory and time of a training on this machine."""
    from gptpipe.params import load_params

    params = load_params()
    from gptpipe.commands.plan import estimate_training  # late: errors in params.yaml need not wait for torch

    estimate = estimate_training(params, Path("data/split"))
    for name, text in estimate.lines.items():
        print(printable(f"{name + ':':<22}{text}"))
    for warning in estimate.warnings:
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

    sys.exit(doctor(fix=options.fix))


def _compare(options: argparse.Namespace) -> None:
    """Compare runs over seeds: mean, standard error, significance."""
    from gptpipe.commands.compare import compare

    print(printable(compare(options.names, options.metric, options.curves)))


def _generate(options: argparse.Namespace) -> None:
    """Continue a prompt with a trained model."""
    from gptpipe.commands.generate import generate

    generate(options)


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

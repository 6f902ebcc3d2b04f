"""The command `gptpipe`: what people do before and after the pipeline."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

from gptpipe import __version__
from gptpipe.shell.console import complain, printable
from gptpipe.shell.errors import ConfigError, InputError
from gptpipe.shell.process import run


def main() -> None:
    run(lambda: _dispatch(sys.argv[1:]))


_MAP = """\
before   gptpipe plan                          the training's size, memory and time on this machine
         gptpipe data                          what the text is like: lengths, sources, rejections, overlap, samples
         gptpipe doctor                        is the record whole? each finding says how to mend it
run      dvc repro                             what changed since the last time
         dvc exp run -S train.lr=1e-4          a variation; with --queue several, then --run-all -j 2
look     mlflow ui                             runs, curves, samples, registered models
         dvc plots show                        curves of the workspace; `dvc plots diff` against another
         gptpipe compare                       table of runs over seeds, the best marked
use      gptpipe generate "Return the"         text from the model; --interactive asks for prompt after prompt
keep     gptpipe restore RUN_ID                a run's code, parameters, data and model in a new folder
         dvc push                              data and models to a remote; `dvc pull` brings them back

`gptpipe COMMAND --help` has the options. What is wrong is one line, and its exit code: 2 parameters, 3 input,
4 a damaged artefact, 5 disk, memory, lock or store, 6 loss not finite."""


def _dispatch(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="gptpipe",
        usage="gptpipe COMMAND [OPTION ...]",
        description="Train a GPT from scratch, reproducibly.",
        epilog=_MAP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gptpipe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="gptpipe", help=argparse.SUPPRESS)

    def command(name: str, does: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        shape = argparse.ArgumentDefaultsHelpFormatter
        added = commands.add_parser(name, description=does.__doc__, formatter_class=shape)
        added.set_defaults(command=does)
        return added

    command("plan", _plan)
    data = command("data", _data)
    data.add_argument("--seed", type=int, default=0, help="of the documents that are drawn")
    generate = command("generate", _generate)
    generate.add_argument("prompt", nargs="?", help="text to continue")
    generate.add_argument("--interactive", action="store_true", help="ask for prompt after prompt; empty line: end")
    generate.add_argument("--model", type=Path, default=Path("models/gpt"), help="model folder")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many tokens")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token, always")
    generate.add_argument("--top-k", type=int, default=50, help="draw from the k most probable tokens; 0 for all")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw from the tokens that make up this probability")
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    compare = command("compare", _compare)
    compare.add_argument("names", nargs="*", help="run ids, names, experiments or sweeps; none: all runs")
    compare.add_argument("--metric", default="test/bits_per_byte", help="as in MLflow")
    compare.add_argument("--curves", type=Path, help="draw the losses into this file: .html, .svg or .png")
    restore = command("restore", _restore)
    restore.add_argument("run_id", help="as in reports/mlflow_run.json, `dvc exp show` and the MLflow UI")
    restore.add_argument("folder", type=Path, nargs="?", help="if not beside this project, with the run's id")
    doctor = command("doctor", _doctor)
    doctor.add_argument("--fix", action="store_true", help="send waiting records, close runs whose process is gone")
    options = parser.parse_args(arguments)
    if options.command is _generate and (options.prompt is None) != options.interactive:
        generate.error("give a prompt, or --interactive")
    options.command(options)


def _plan(_: argparse.Namespace) -> None:
    """What the training of params.yaml will take, by a few steps on this machine."""
    from gptpipe.params import load_params

    params = load_params()
    from gptpipe.commands.plan import forecast  # late: importing torch takes seconds, bad parameters are told first

    found = forecast(params, Path("data/split"))
    for name, text in found.lines.items():
        print(printable(f"{name + ':':<22}{text}"))
    for warning in found.warnings:
        complain(f"warning: {warning}")


def _data(options: argparse.Namespace) -> None:
    """Show what the text is like so far, as far as the stages have come; also in reports/data.md and data.svg."""
    from rich.console import Console
    from rich.markdown import Markdown

    from gptpipe.commands.data import view_data

    page, run = view_data(Path(), options.seed), Path("reports/mlflow_run.json")
    Console().print(Markdown(printable(page)))
    if run.exists():
        from gptpipe.record.store import RunWriter, connect, find_run, read_run_id, store_errors  # late: slow imports

        with store_errors():
            if run_id := find_run(connect(), read_run_id(run)):  # a fresh clone's store has none
                RunWriter(run_id).write(("text", ["data.md", page]))


def _generate(options: argparse.Namespace) -> None:
    """Continue a prompt with a trained model."""
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}; set it to 1 or more")
    from gptpipe.base.manifest import verify
    from gptpipe.model.device import best_device, memory_errors
    from gptpipe.model.generate import Sampling
    from gptpipe.score.continuations import continue_text, load_generator  # late: --help must not wait for torch

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows other characters as `?`
    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k or None, top_p=options.top_p, seed=options.seed
    )
    verify(options.model)
    model, tokenizer = load_generator(options.model)
    model.to(best_device())

    def answer(prompt: str) -> None:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # what Python makes of other bytes
            raise InputError("the prompt is not valid UTF-8; convert it")
        pieces = continue_text(model, tokenizer, prompt, options.max_new_tokens, sampling)
        with memory_errors("out of memory; shorten the prompt, or lower --max-new-tokens"):
            for piece in chain([prompt], pieces):
                print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        print()

    if not options.interactive:
        answer(options.prompt)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (from now on `input` edits lines and keeps a history)
    with suppress(EOFError):
        while True:
            try:
                if not (prompt := input("> " if sys.stdin.isatty() else "")):
                    return
                answer(prompt)
            except KeyboardInterrupt:  # ends the text, not the program
                print()
            except UnicodeDecodeError as error:
                raise InputError("the prompt is not valid UTF-8; convert it") from error


def _compare(options: argparse.Namespace) -> None:
    """Table of runs: mean, standard error and significance over seeds."""
    from gptpipe.commands.compare import compare

    print(printable(compare(options.names, options.metric, options.curves)))


def _restore(options: argparse.Namespace) -> None:
    """Bring back a run's code, parameters, data and model in a new folder."""
    from gptpipe.commands.restore import restore

    beside = Path.cwd().resolve()
    restore(options.run_id, options.folder or beside.with_name(f"{beside.name}-{options.run_id[:8]}"))


def _doctor(options: argparse.Namespace) -> None:
    """Check artefacts, store, registry, versions and more; say how to mend what is wrong."""
    from gptpipe.commands.doctor import doctor

    sys.exit(doctor(fix=options.fix))


if __name__ == "__main__":
    main()

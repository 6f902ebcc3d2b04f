"""tokenize: encode documents, by a tiktoken encoding or by one that is trained on the train documents."""

from pathlib import Path

from gptpipe.shell.process import run_stage


def main() -> None:
    from gptpipe.params import load_params
    from gptpipe.record.starting_model import names_a_model, starting_model
    from gptpipe.shell.console import say
    from gptpipe.tokenize.encode import tokenize

    params = load_params()
    section, fractions = params.tokenize, params.split.fractions
    name = section.encoding if names_a_model(section.encoding) else None
    with starting_model("tokenize.encoding", name, Path("models/gpt")) as model:
        folder = model.folder if model else None
        counts = tokenize(Path("data/raw"), Path("data/tokens"), section, fractions, params.seed, folder)
    say(
        f"tokenize: {counts['tokens']:,} tokens, vocabulary of {counts['vocab_size']:,}, "
        f"{counts['bytes'] / counts['tokens']:.2f} bytes per token",
        "quiet",
    )


if __name__ == "__main__":
    run_stage("tokenize", main, __doc__)

"""train: train a GPT, and keep the model with the lowest validation loss."""

from functools import partial
from pathlib import Path

from gptpipe.shell.process import run_stage


def main() -> None:
    from gptpipe.params import load_params
    from gptpipe.shell.console import console, say
    from gptpipe.shell.environment import rank_info

    console.quiet = rank_info().rank > 0  # all ranks would print the same lines
    params = load_params()
    from gptpipe.record.run import training_run  # late: fail on bad parameters before the slow imports
    from gptpipe.train.session import train_model

    open_record = partial(training_run, params)
    best = train_model(params, Path("data/split"), Path("models/gpt"), Path("reports"), open_record)
    say(f"train: best validation loss {best['loss']:.4f}, {best['bits_per_byte']:.4f} bits per byte", "quiet")


if __name__ == "__main__":
    run_stage("train", main, __doc__)

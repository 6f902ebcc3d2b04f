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
    from gptpipe.model.hf_config import with_shape_of
    from gptpipe.record.run import training_run  # late: fail on bad parameters before the slow imports
    from gptpipe.record.starting_model import starting_model
    from gptpipe.train.session import train_model

    output = Path("models/gpt")
    with starting_model("train.init_from", params.train.init_from, output) as start:
        folder = None
        if start is not None:
            folder = start.folder
            params = params.starting_from(start.name, with_shape_of(params.model, folder))
        open_record = partial(training_run, params)
        best = train_model(params, Path("data/split"), output, Path("reports"), open_record, folder)
    say(f"train: best validation loss {best['loss']:.4f}, {best['bits_per_byte']:.4f} bits per byte", "quiet")


if __name__ == "__main__":
    run_stage("train", main, __doc__)

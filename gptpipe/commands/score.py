"""`gptpipe score`: a model's loss on the held-out documents of a split, also one that it was not trained on."""

from pathlib import Path

from gptpipe.base.manifest import verify
from gptpipe.formats.sides import Side
from gptpipe.formats.streams import open_stream, verify_split
from gptpipe.formats.tokenizer import RANKS, TOKENIZER
from gptpipe.model.device import best_device
from gptpipe.score.continuations import load_generator
from gptpipe.score.metrics import compute_metrics
from gptpipe.score.scoring import score, scoring_of
from gptpipe.shell.errors import ConfigError

_HELD_OUT: tuple[Side, ...] = ("val", "test")


def score_split(model_folder: Path, split: Path) -> list[str]:
    """One line for each held-out side that has documents.

    The model is scored as it was trained. Raises ConfigError if the split has other tokens than the model,
    InputError, IntegrityError, ResourceError.
    """
    manifest = verify(model_folder)
    verify_split(split)
    model, tokenizer = load_generator(model_folder)
    if (model_folder / RANKS).read_bytes() != (split / TOKENIZER / RANKS).read_bytes():
        raise ConfigError(
            f"{split}: its tokens are not those of {model_folder}; "
            "make it with tokenize.encoding set to a copy of the model in data/start/"
        )
    model.to(best_device())
    scoring = scoring_of(model_folder, manifest, tokenizer.end_of_text)
    lines = []
    for side in _HELD_OUT:
        stream = open_stream(split, side, tokenizer.vocab_size)
        if len(stream.tokens) > 1:
            metrics = compute_metrics(score(model, stream, scoring).by_document, stream.documents)
            lines.append(
                f"{model_folder} on {split}, {side}: {metrics['loss']:.4f} nats per token, "
                f"{metrics['bits_per_byte']:.4f} bits per byte"
            )
    return lines

"""`gptpipe score`: the loss of any model of this project on any split with the same tokens."""

import shutil
from pathlib import Path

import pytest
import tiny

from gptpipe.base.manifest import new_folder
from gptpipe.commands.score import score_split
from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.hf_weights import save_model
from gptpipe.score.metrics import compute_metrics
from gptpipe.score.scoring import Scoring, score
from gptpipe.shell.errors import ConfigError


def model_for(folder: Path, split: Path, scoring: Scoring) -> Path:
    """A model with the tokens of a split, that was scored like this in its training."""
    tokenizer = Tokenizer.load(split / "tokenizer")
    with new_folder(folder, {}) as new:
        weights = dict(tiny.network(tokenizer.vocab_size).named_parameters())
        save_model(new.path, tiny.model_params(), tokenizer.vocab_size, tokenizer.end_of_text, weights)
        tokenizer.save(new.path)
        new.counts["scoring"] = scoring.describe()
    return folder


def test_each_held_out_side_has_a_line_with_its_loss(tmp_path: Path, toy_split: Path) -> None:
    model = model_for(tmp_path / "model", toy_split, Scoring())
    stream = open_stream(toy_split, "test")
    metrics = compute_metrics(score(tiny.network(300), stream).by_document, stream.documents)
    val, test = score_split(model, toy_split)
    assert val.startswith(f"{model} on {toy_split}, val: ")
    assert f"test: {metrics['loss']:.4f} nats per token, {metrics['bits_per_byte']:.4f} bits per byte" in test


def test_a_model_is_scored_with_the_mask_of_its_training(tmp_path: Path, toy_split: Path) -> None:
    masked = Scoring(end_of_text=Tokenizer.load(toy_split / "tokenizer").end_of_text)
    model = model_for(tmp_path / "model", toy_split, masked)
    stream = open_stream(toy_split, "test")
    loss, without_mask = (
        compute_metrics(score(tiny.network(300), stream, scoring).by_document, stream.documents)["loss"]
        for scoring in (masked, Scoring())
    )
    _, test = score_split(model, toy_split)
    assert f"test: {loss:.4f} nats per token" in test
    assert f"{loss:.4f}" != f"{without_mask:.4f}"


def test_a_split_with_other_tokens_is_a_config_error(tmp_path: Path, toy_split: Path) -> None:
    shutil.copytree(tiny.make_model(tmp_path / "model"), tmp_path / "other")
    with pytest.raises(ConfigError, match="its tokens are not those of"):
        score_split(tmp_path / "other", toy_split)

"""Stage evaluate as one function: model and split in, figures and pages out."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gptpipe.base.files import write_bytes, write_json
from gptpipe.base.manifest import Manifest, verify
from gptpipe.base.pages import render_markdown
from gptpipe.evaluate.params import EvaluateParams
from gptpipe.evaluate.reference_points import unigram_bits_per_byte, xz_bits_per_byte
from gptpipe.formats.sides import Side
from gptpipe.formats.streams import Stream, open_stream, verify_split
from gptpipe.model.device import best_device, keep_freed_memory
from gptpipe.model.generate import Sampling
from gptpipe.score.continuations import continue_documents, continue_text, load_generator, overlap_scores
from gptpipe.score.metrics import calibration_error, calibration_table, figures, figures_by_source
from gptpipe.score.scoring import score
from gptpipe.shell.console import Progress
from gptpipe.shell.errors import IntegrityError

_TEMPLATES = Path(__file__).with_name("templates")
_HELD_OUT: tuple[Side, ...] = ("val", "test")


@dataclass(frozen=True)
class Evaluation:
    """What was found, for the record."""

    results: dict[str, Any]  # as in reports/eval.json
    card: str
    samples: str
    step: int  # of the training, that the model is from
    lineage: Manifest  # of the split

    def metrics(self) -> dict[str, float]:
        """The figures by the names that the tracking store gets, such as `test/bits_per_byte`."""
        flat: dict[str, float] = {}
        for part in (*_HELD_OUT, "continuations"):
            flat |= {f"{part}/{name}": float(value) for name, value in self.results.get(part, {}).items()}
        for side, references in self.results["reference_bits_per_byte"].items():
            flat |= {f"{side}/{name}_bits_per_byte": value for name, value in references.items()}
        return flat


def evaluate_model(
    model_folder: Path, split_folder: Path, reports: Path, params: EvaluateParams, seed: int
) -> Evaluation:
    """Score a model on what was held out, sample from it, and write the reports. Raises IntegrityError."""
    keep_freed_memory()
    made, lineage = verify(model_folder), verify_split(split_folder)
    if made.made_from.get("split") != lineage.digest:
        raise IntegrityError(f"{model_folder}: was trained on another split than {split_folder} holds; run `dvc repro`")
    model, tokenizer = load_generator(model_folder)
    model.to(best_device())
    streams = {side: open_stream(split_folder, side, tokenizer.vocab_size) for side in ("train", *_HELD_OUT)}
    held_out = {side: streams[side] for side in _HELD_OUT if len(streams[side].tokens) > 1}
    results: dict[str, Any] = {"by_source": {}, "reference_bits_per_byte": {}}
    xz = xz_bits_per_byte(streams["train"], held_out, tokenizer)
    positions, calibration = [], []
    with Progress("evaluate", unit="tokens", total=sum(len(s.tokens) - 1 for s in held_out.values())) as progress:
        for side, stream in held_out.items():
            scores = score(model, stream, advance=progress.advance)
            results[side] = figures(scores.by_document, stream.documents)
            results["by_source"][side] = figures_by_source(scores.by_document, stream.documents)
            by_confidence = calibration_table(scores.by_confidence)
            results[side]["calibration_error"] = calibration_error(by_confidence)
            calibration.append(by_confidence.assign(split=side))
            nats, hits, n_tokens = scores.by_position
            n = n_tokens.clip(min=1)
            found = {"loss": nats / n, "token_accuracy": hits / n}
            positions.append(pd.DataFrame({"split": side, "position": np.arange(len(n)), **found}))
            results["reference_bits_per_byte"][side] = {
                "unigram": unigram_bits_per_byte(streams["train"], stream, tokenizer.vocab_size),
                "xz": xz[side],
            }
    last = streams["test"] if "test" in held_out else streams["val"]
    continuations = continue_documents(
        model, tokenizer, last, params.continuation_documents, params.continuation_tokens
    )
    results["continuations"] = overlap_scores(continuations)
    results["test_digest"] = documents_digest(streams["test"])
    sampling = Sampling(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, seed=seed)
    samples = {p: "".join(continue_text(model, tokenizer, p, params.max_new_tokens, sampling)) for p in params.prompts}
    trained_card = (model_folder / "README.md").read_text(encoding="utf-8")
    card = render_markdown(_TEMPLATES / "model_card.md.jinja", card=trained_card, results=results, sides=list(held_out))
    page = render_markdown(_TEMPLATES / "samples.md.jinja", samples=samples, continuations=continuations)
    write_json(reports / "eval.json", results)
    by_source = results["by_source"].items()
    sources = [{"split": side, "source": name, **found} for side, of in by_source for name, found in of.items()]
    tables = {
        "positions": pd.concat(positions),
        "sources": pd.DataFrame(sources),
        "calibration": pd.concat(calibration),
        "lengths": pd.concat([_lengths(side, stream) for side, stream in streams.items()]),
    }
    for name, table in tables.items():
        write_bytes(reports / f"eval.{name}.csv", table.to_csv(index=False).encode())
    write_bytes(reports / "samples.md", page.encode())
    write_bytes(reports / "model_card.md", card.encode())
    return Evaluation(results, card, page, made.counts["best_step"], lineage)


def _lengths(side: str, stream: Stream) -> pd.DataFrame:
    """Share of a side's documents by length, up to each power of 2 tokens."""
    up_to = (2 ** np.ceil(np.log2(stream.documents["n_tokens"]))).astype(int)
    shares = up_to.value_counts(normalize=True).sort_index()
    return pd.DataFrame({"split": side, "n_tokens": shares.index, "share": shares.to_numpy()})


def documents_digest(stream: Stream) -> str:
    """SHA-256 of the sorted document ids: names a test set whatever it is tokenized with."""
    return hashlib.sha256("\n".join(sorted(stream.documents["id"])).encode()).hexdigest()

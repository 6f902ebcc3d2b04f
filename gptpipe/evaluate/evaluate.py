"""Stage evaluate as one function: check the inputs, score, sample, and write the reports."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from gptpipe.base.files import write_bytes, write_json
from gptpipe.base.manifest import Manifest, verify
from gptpipe.base.pages import render_markdown
from gptpipe.evaluate.charts import length_histogram
from gptpipe.evaluate.cloze import cloze
from gptpipe.evaluate.document_scores import score_table
from gptpipe.evaluate.memorization import memorization
from gptpipe.evaluate.minimal_pairs import minimal_pairs
from gptpipe.evaluate.overlapping_windows import overlapping_metrics
from gptpipe.evaluate.params import EvaluateParams
from gptpipe.evaluate.reference_points import reference_bits_per_byte
from gptpipe.evaluate.result_rows import result_rows
from gptpipe.evaluate.sentences import sentences_of
from gptpipe.evaluate.transformers_check import check_with_transformers, is_installed
from gptpipe.formats.sides import SIDES, Side
from gptpipe.formats.streams import Stream, open_stream, verify_split
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.harness.tasks import harness_errors, load_tasks
from gptpipe.model.device import best_device, keep_freed_memory
from gptpipe.model.generate import Sampling
from gptpipe.model.gpt import GPT
from gptpipe.score.continuations import announce_cut, continue_documents, load_generator, overlap_scores
from gptpipe.score.metrics import (
    Metrics,
    calibration_error,
    calibration_table,
    compute_metrics,
    metrics_by_source,
    ratio,
)
from gptpipe.score.scoring import Scores, Scoring, score, scoring_of
from gptpipe.score.text_batch import continue_texts
from gptpipe.shell.console import Progress
from gptpipe.shell.errors import IntegrityError

_TEMPLATES = Path(__file__).with_name("templates")
_HELD_OUT: tuple[Side, ...] = ("val", "test")
_POSITION_COLUMNS = (
    "split",
    "positions",
    "loss",
    "loss_standard_error",
    "token_accuracy",
    "token_accuracy_standard_error",
    "n_tokens",
    "n_documents",
)


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation, for the report and the tracking store."""

    results: dict[str, Any]  # the content of reports/eval.json
    samples: str  # the page reports/samples.md
    step: int  # the training step that the model is from
    n_parameters: int
    split: Manifest
    documents: pd.DataFrame  # nats and bytes of each held-out document, as of `score_table`
    transformers: str | None = None  # the outcome of the comparison with transformers; None: not compared

    def metrics(self) -> Metrics:
        """The metrics under their names in the tracking store, such as `test/bits_per_byte`."""
        metrics: Metrics = {}
        for part in (*_HELD_OUT, "continuations"):
            metrics |= {f"{part}/{name}": float(value) for name, value in self.results.get(part, {}).items()}
        for row in result_rows(self.results):
            values = {row.key: row.value, f"{row.key}_standard_error": row.standard_error}
            metrics |= {name: value for name, value in values.items() if value is not None}
        for side, references in self.results["reference_bits_per_byte"].items():
            metrics |= {f"{side}/{name}_bits_per_byte": value for name, value in references.items()}
        return metrics

    def summary(self) -> list[str]:
        """Lines of headline metrics: of each held-out side, of tasks, and of a comparison with transformers."""
        lines: list[str] = []
        for side in _HELD_OUT:
            if side in self.results:
                metrics, references = self.results[side], self.results["reference_bits_per_byte"][side]
                error = metrics["bits_per_byte_standard_error"]
                bits = f"{metrics['bits_per_byte']:.4f} ± {error:.4f} bits per byte"
                compressors = f"PPMd {references['ppmd']:.4f}, xz {references['xz']:.4f}"
                lines.append(f"{side} {bits} ({compressors}), perplexity {metrics['perplexity']:.2f}")
        rows = result_rows(self.results)
        lines += [f"{row.label} {row} on {row.note}" for row in rows if row.key.startswith("task/")]
        return [*lines, self.transformers] if self.transformers else lines


def evaluate_model(
    model_folder: Path, split_folder: Path, reports: Path, params: EvaluateParams, seed: int
) -> Evaluation:
    """Score a model on the held-out documents, sample from it, and write reports.

    Raises IntegrityError, also if transformers computes something else from the model folder.
    """
    keep_freed_memory()
    tasks = load_tasks(params.tasks, Path(params.task_folder)) if params.tasks else None
    model_manifest, split = _verified(model_folder, split_folder)
    model, tokenizer = load_generator(model_folder)
    model.to(best_device())
    streams = {side: open_stream(split_folder, side, tokenizer.vocab_size) for side in SIDES}
    held_out = {side: streams[side] for side in _HELD_OUT if len(streams[side].tokens) > 1}
    last: Side = "test" if "test" in held_out else "val"

    compared = None
    if params.check_transformers and is_installed():
        compared = check_with_transformers(model_folder, model, tokenizer, streams[last].tokens)
    scoring = scoring_of(model_folder, model_manifest, tokenizer.end_of_text)
    scores = _score(model, held_out, scoring)
    continuations = continue_documents(
        model, tokenizer, streams[last], params.continuation_documents, params.continuation_tokens
    )
    samples = _sample(model, tokenizer, params, seed)

    results: dict[str, Any] = {
        side: _metrics_of_side(scores[side], stream) | overlapping_metrics(model, stream, scoring)
        for side, stream in held_out.items()
    }
    results["by_source"] = {
        side: metrics_by_source(scores[side].by_document, stream.documents) for side, stream in held_out.items()
    }
    results["reference_bits_per_byte"] = reference_bits_per_byte(streams["train"], held_out, tokenizer)
    results["continuations"] = overlap_scores(continuations)
    results |= _built_in(model, tokenizer, streams["train"], streams[last], scoring, seed)
    if tasks is not None:
        from gptpipe.evaluate.harness_model import HarnessModel, run_tasks  # late: the package is optional

        with harness_errors(", ".join(params.tasks)):
            results["tasks"] = run_tasks(HarnessModel(model, tokenizer, scoring, seed), tasks, seed)
    results["test_digest"] = documents_digest(streams["test"])
    results["scoring"] = scoring.describe()

    page = render_markdown(_TEMPLATES / "samples.md.jinja", samples=samples, continuations=continuations)
    write_json(reports / "eval.json", results)
    for name, table in _tables(scores, streams, results["by_source"]).items():
        write_bytes(reports / f"eval.{name}.csv", table.to_csv(index=False).encode())
    write_bytes(reports / "samples.md", page.encode())
    documents = score_table(scores, held_out)
    step, n_parameters = (model_manifest.counts[name] for name in ("best_step", "parameters"))
    return Evaluation(results, page, step, n_parameters, split, documents, compared)


def _verified(model_folder: Path, split_folder: Path) -> tuple[Manifest, Manifest]:
    """The manifests of the model and of the split it was trained on. Raises IntegrityError."""
    model, split = verify(model_folder), verify_split(split_folder)
    if model.made_from.get("split") != split.digest:
        raise IntegrityError(
            f"{model_folder}: was trained on another split than {split_folder} holds; run `dvc repro`"
        )
    return model, split


def _score(model: GPT, held_out: Mapping[Side, Stream], scoring: Scoring) -> dict[Side, Scores]:
    n_tokens = sum(len(stream.tokens) - 1 for stream in held_out.values())
    with Progress("evaluate", unit="tokens", total=n_tokens) as progress:
        return {
            side: score(model, stream, scoring, with_positions=True, advance=progress.advance)
            for side, stream in held_out.items()
        }


def _sample(model: GPT, tokenizer: Tokenizer, params: EvaluateParams, seed: int) -> dict[str, str]:
    """The continuation of each prompt."""
    for i, prompt in enumerate(params.prompts):
        announce_cut(model, tokenizer, prompt, f"evaluate.prompts[{i}]")
    sampling = Sampling(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, seed=seed)
    texts = continue_texts(model, tokenizer, params.prompts, params.max_new_tokens, sampling)
    return dict(zip(params.prompts, texts, strict=True))


def _built_in(
    model: GPT, tokenizer: Tokenizer, train: Stream, held_out: Stream, scoring: Scoring, seed: int
) -> dict[str, dict[str, Any]]:
    """The results of the evaluations that need no download, by their names."""
    sentences = sentences_of(held_out, tokenizer)
    return {
        "minimal_pairs": minimal_pairs(model, tokenizer, sentences, scoring, seed),
        "cloze": cloze(model, tokenizer, sentences, scoring, seed),
        "memorization": memorization(model, tokenizer.end_of_text, train, held_out, seed),
    }


def _metrics_of_side(scores: Scores, stream: Stream) -> Metrics:
    metrics = compute_metrics(scores.by_document, stream.documents)
    return {**metrics, "calibration_error": calibration_error(calibration_table(scores.by_confidence))}


def _tables(
    scores: Mapping[Side, Scores],
    streams: Mapping[Side, Stream],
    by_source: Mapping[Side, Mapping[str, Metrics]],
) -> dict[str, pd.DataFrame]:
    """The tables that charts are drawn from, by the name of their CSV file; column `split` is the side."""
    sources = [
        {"split": side, "source": source, **metrics}
        for side, metrics_of_sources in by_source.items()
        for source, metrics in metrics_of_sources.items()
    ]
    calibration = [calibration_table(scores[side].by_confidence).assign(split=side) for side in scores]
    return {
        "positions": pd.concat([_position_table(side, scores[side]) for side in scores]),
        "sources": pd.DataFrame(sources),
        "calibration": pd.concat(calibration),
        "lengths": pd.concat([_length_table(side, stream) for side, stream in streams.items()]),
    }


def _position_table(side: Side, scores: Scores) -> pd.DataFrame:
    """Mean loss and accuracy in each group of positions in the window, with standard errors over documents.

    A group that only one document reaches is left out, because its error is unknown.
    """
    rows: list[dict[str, Any]] = []
    for group, (nats, hits, n_tokens) in enumerate(scores.by_position.swapaxes(0, 1)):
        is_reached = n_tokens > 0
        if is_reached.sum() < 2:
            continue
        loss, loss_error = ratio(nats[is_reached], n_tokens[is_reached])
        accuracy, accuracy_error = ratio(hits[is_reached], n_tokens[is_reached])
        row = {
            "split": side,
            "positions": _positions_of_group(group),
            "loss": loss,
            "loss_standard_error": loss_error,
            "token_accuracy": accuracy,
            "token_accuracy_standard_error": accuracy_error,
            "n_tokens": int(n_tokens.sum()),
            "n_documents": int(is_reached.sum()),
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=_POSITION_COLUMNS)


def _positions_of_group(group: int) -> str:
    """A group of `position_groups` in words: 0, 1, 2-3, 4-7, ..."""
    if group < 2:
        return str(group)
    return f"{2 ** (group - 1)}-{2**group - 1}"


def _length_table(side: Side, stream: Stream) -> pd.DataFrame:
    """The share of a side's documents in each class of length, in tokens."""
    upper_bounds, counts = length_histogram(stream.documents["n_tokens"].to_numpy())
    return pd.DataFrame({"split": side, "n_tokens": upper_bounds, "share": counts / max(1, counts.sum())})


def documents_digest(stream: Stream) -> str:
    """SHA-256 of the sorted document ids. It identifies a test set independently of the tokenizer."""
    return hashlib.sha256("\n".join(sorted(stream.documents["id"])).encode()).hexdigest()

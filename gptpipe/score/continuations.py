"""Models that generate text, and their continuations of held-out documents."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptpipe.formats.streams import Stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.generate import Sampling, generate
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import load_model
from gptpipe.shell.console import complain
from gptpipe.shell.errors import IntegrityError

_BATCH = 16  # documents continued at once; each needs a cache of keys and values for the whole context


def load_generator(folder: Path) -> tuple[GPT, Tokenizer]:
    """The network of a model folder, on the CPU, and its tokenizer. The caller has verified the folder.

    Raises InputError, IntegrityError, ResourceError.
    """
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder)
    if model.vocab_size != tokenizer.vocab_size:
        raise IntegrityError(
            f"{folder}: the network has {model.vocab_size:,} tokens, the tokenizer {tokenizer.vocab_size:,}; "
            "create the folder again with `dvc repro -f`"
        )
    return model, tokenizer


def announce_cut(model: GPT, tokenizer: Tokenizer, prompt: str, name: str) -> None:
    """Warn if the model sees only the end of a prompt, because the prompt is longer than the context."""
    _announce_cut(model, len(tokenizer.encode(prompt)), name)


def _announce_cut(model: GPT, n_tokens: int, name: str) -> None:
    context = model.params.context_length
    if n_tokens > context:
        complain(
            f"warning: {name} has {n_tokens:,} tokens, the context of the model has {context:,}; only the last "
            f"{context:,} are used"
        )


@dataclass(frozen=True)
class Continuation:
    """The start of a held-out document, its real continuation, and the model's."""

    prompt: str
    reference: str
    generated: str


def continue_documents(
    model: GPT, tokenizer: Tokenizer, stream: Stream, n_documents: int, n_tokens: int
) -> list[Continuation]:
    """Continue the first `n_tokens` of documents by `n_tokens`, greedily.

    Uses the first `n_documents` with more than 2 * `n_tokens` tokens.
    """
    table = stream.documents[stream.documents["n_tokens"] > 2 * n_tokens].head(n_documents)
    if len(table):
        _announce_cut(model, n_tokens, "evaluate.continuation_tokens: the start of each document")
    results: list[Continuation] = []
    for start in range(0, len(table), _BATCH):
        offsets = table["offset"].to_numpy()[start : start + _BATCH]
        texts = np.stack([stream.tokens[offset : offset + 2 * n_tokens] for offset in offsets])
        texts = texts.astype(np.int64)  # (B, 2 * n_tokens)
        steps = list(generate(model, texts[:, :n_tokens].tolist(), n_tokens, Sampling(temperature=0)))
        generated = np.array(steps).T  # (B, n_tokens)
        for text, new in zip(texts, generated, strict=True):
            ends = np.flatnonzero(new == tokenizer.end_of_text)
            n_new = ends[0] if len(ends) else len(new)
            parts = (text[:n_tokens], text[n_tokens:], new[:n_new])
            results.append(Continuation(*(tokenizer.decode(part.tolist()) for part in parts)))
    return results


def overlap_scores(continuations: list[Continuation]) -> dict[str, float]:
    """Corpus BLEU (Papineni et al., 2002; 0 to 100) and mean ROUGE-L F1 (Lin, 2004; 0 to 1) of continuations.

    Both count shared words. For open-ended text they are always low: use them to compare models, not to judge
    one.
    """
    if not continuations:
        return {}
    import sacrebleu  # late: importing both takes a second, and only evaluation needs them
    from rouge_score import rouge_scorer

    generated = [c.generated for c in continuations]
    references = [c.reference for c in continuations]
    bleu = sacrebleu.corpus_bleu(generated, [references])
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rouge = [scorer.score(c.reference, c.generated)["rougeL"].fmeasure for c in continuations]
    error = float(np.std(rouge, ddof=1) / len(rouge) ** 0.5) if len(rouge) > 1 else 0.0
    return {
        "bleu": float(bleu.score),
        "rouge_l": float(np.mean(rouge)),
        "rouge_l_standard_error": error,
        "n_documents": len(continuations),
    }

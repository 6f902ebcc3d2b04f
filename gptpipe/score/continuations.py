"""Text from the model: continuations of a prompt, and how near those of held-out documents come to the real text."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gptpipe.formats.streams import Stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.generate import Sampling, generate
from gptpipe.model.gpt import GPT
from gptpipe.model.hf_weights import load_model
from gptpipe.shell.errors import IntegrityError

_BATCH = 16  # documents continued at once: each has a cache of keys and values over the whole context


def load_generator(folder: Path) -> tuple[GPT, Tokenizer]:
    """The network of a model folder on the CPU, and its tokenizer. The caller has verified the folder.

    Raises InputError, IntegrityError, ResourceError.
    """
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    if model.vocab_size != tokenizer.vocab_size:
        raise IntegrityError(
            f"{folder}: the network has {model.vocab_size:,} tokens, the tokenizer {tokenizer.vocab_size:,}; make the "
            "folder again with `dvc repro -f`"
        )
    return model, tokenizer


def continue_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling
) -> Iterator[str]:
    """The continuation of a prompt piece by piece, up to the end of the document or `max_new_tokens`."""
    device = model.embedding.weight.device
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.end_of_text]], device=device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    for token in generate(model, ids, max_new_tokens, sampling):
        if int(token) == tokenizer.end_of_text:
            break
        yield decoder.decode(tokenizer.decode_bytes([int(token)]))
    yield decoder.decode(b"", final=True)


@dataclass(frozen=True)
class Continuation:
    """The start of a held-out document, how it goes on, and how the model goes on."""

    prompt: str
    reference: str
    generated: str


def continue_documents(
    model: GPT, tokenizer: Tokenizer, stream: Stream, n_documents: int, n_tokens: int
) -> list[Continuation]:
    """Greedy continuations by `n_tokens` of the first `n_documents` that have twice as many, given the first half."""
    table = stream.documents[stream.documents["n_tokens"] > 2 * n_tokens].head(n_documents)
    device = model.embedding.weight.device
    results: list[Continuation] = []
    for start in range(0, len(table), _BATCH):
        offsets = table["offset"].to_numpy()[start : start + _BATCH]
        whole = np.stack([stream.tokens[o : o + 2 * n_tokens] for o in offsets]).astype(np.int64)  # (B, 2 * n_tokens)
        prompts = torch.from_numpy(whole[:, :n_tokens]).to(device)
        steps = list(generate(model, prompts, n_tokens, Sampling(temperature=0)))
        generated = torch.stack(steps, dim=1).cpu().numpy()
        for ids, new in zip(whole, generated, strict=True):
            ends = np.flatnonzero(new == tokenizer.end_of_text)
            kept = new[: ends[0]] if len(ends) else new
            prompt, reference = tokenizer.decode(ids[:n_tokens].tolist()), tokenizer.decode(ids[n_tokens:].tolist())
            results.append(Continuation(prompt, reference, tokenizer.decode(kept.tolist())))
    return results


def overlap_scores(continuations: list[Continuation]) -> dict[str, float]:
    """Corpus BLEU (Papineni et al., 2002; 0 to 100) and mean ROUGE-L F1 (Lin, 2004; 0 to 1) of continuations.

    Both count shared words; for open-ended text they are low by nature and serve to compare models, not to judge one.
    """
    if not continuations:
        return {}
    import sacrebleu  # late: with rouge_score, a second of import that only evaluation needs
    from rouge_score import rouge_scorer

    generated, references = [c.generated for c in continuations], [c.reference for c in continuations]
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

"""What evaluation writes for people: samples and the full model card, as Markdown."""

from typing import Any

from gptpipe.evaluation.continuations import Continuation


def samples_page(samples: dict[str, str], continuations: list[Continuation]) -> str:
    """Continuations of the prompts, then of held-out documents beside the real text."""
    parts = ["# Samples\n"]
    parts += [_quote(f"**{prompt}**{text}") for prompt, text in samples.items()]
    if continuations:
        parts.append("# Held-out documents\n\nGreedy continuations: the start, the real text, the model's.\n")
    for c in continuations[:8]:
        parts.append(
            "\n".join(
                (
                    "```text",
                    _fenced(c.prompt),
                    "--- real",
                    _fenced(c.reference),
                    "--- model",
                    _fenced(c.generated),
                    "```\n",
                )
            )
        )
    return "\n".join(parts)


def full_card(card: str, results: dict[str, Any]) -> str:
    """The model card of training with a table of what evaluation found."""
    sides = [side for side in ("val", "test") if side in results]
    rows = [
        ("loss (nats per token)", "loss", "{:.4f}"),
        ("perplexity", "perplexity", "{:.2f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
        ("token accuracy", "token_accuracy", "{:.4f}"),
    ]
    lines = [f"| | {' | '.join(sides)} |", f"|---|{'---|' * len(sides)}"]
    for label, key, form in rows:
        cells = [
            f"{form.format(results[side][key])} ± {form.format(results[side][f'{key}_standard_error'])}"
            for side in sides
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    references = results["reference_bits_per_byte"]
    for name in ("unigram", "xz"):
        lines.append(f"| bits per byte of {name} | {' | '.join(f'{references[side][name]:.4f}' for side in sides)} |")
    for name, label in (("bleu", "BLEU"), ("rouge_l", "ROUGE-L")):
        if name in results["continuations"]:
            lines.append(
                f"| {label} of continuations | {results['continuations'][name]:.4f} |" + " |" * (len(sides) - 1)
            )
    return f"{card}\n## Evaluation\n\nEach figure with its standard error over documents.\n\n" + "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return "".join(f"> {line}  \n" for line in text.splitlines()) + "\n"


def _fenced(text: str) -> str:
    return text.replace("```", "'''")

"""What collect keeps and leaves out, by source and reason, with the first few texts of each: `reports/collect.md`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2

from gptpipe.corpus.cleaning import Rejected
from gptpipe.files import write_bytes, write_json

SOURCES = "sources.json"  # beside the shards
_EXAMPLES, _CHARACTERS = 3, 200  # of each reason in each source, in the order of the source; of each example


class Rejections:
    """Counts of each source, and examples of what it lost."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.examples: list[dict[str, str]] = []

    def keep(self, source: str, n_bytes: int, n: int = 1) -> None:
        """Count a document as kept; `n` of -1 takes it back."""
        self.counts.setdefault(source, Counter()).update(documents=n, bytes=n * n_bytes)

    def reject(self, source: str, rejected: Rejected, text: str) -> None:
        counts = self.counts.setdefault(source, Counter())
        counts[f"rejected_{rejected.reason}"] += 1
        if counts[f"rejected_{rejected.reason}"] <= _EXAMPLES:
            shown = " ".join(text[: 4 * _CHARACTERS].split()).encode(errors="backslashreplace").decode()
            example = {"source": source, "reason": rejected.reason, "why": rejected.why}
            self.examples.append({**example, "text": shown[:_CHARACTERS] + "…" * (len(shown) > _CHARACTERS)})

    def save(self, folder: Path) -> None:
        write_json(folder / SOURCES, {"counts": self.counts, "examples": self.examples})


def read_rejections(folder: Path) -> dict[str, Any]:
    """`counts` (source -> name -> n) and `examples`, as a corpus holds them."""
    found: dict[str, Any] = json.loads((folder / SOURCES).read_bytes())
    return found


def write_report(folder: Path, path: Path) -> None:
    """Write the sources of the corpus in `folder`, and what they lost, as Markdown."""
    template = Path(__file__).with_name("collect.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    write_bytes(path, environment.from_string(template).render(read_rejections(folder)).encode())

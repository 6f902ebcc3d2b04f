"""What collect keeps and leaves out: counted, also by source, with examples; becomes `reports/collect.md`."""

from collections import Counter
from pathlib import Path

import jinja2

from gptpipe.corpus.cleaning import Rejected
from gptpipe.corpus.document import Document
from gptpipe.files import write_bytes

_EXAMPLES, _CHARACTERS = 3, 200  # of each reason in each source, in the order of the source; of each example


class Tally(Counter[str]):
    """Counts of the whole corpus, and `by_source` with the first `examples` of each reason."""

    def __init__(self, *sources: str) -> None:
        super().__init__(documents_in=0, documents=0, bytes=0)
        self.by_source = {source: Counter(documents=0, bytes=0) for source in sources}
        self.examples: list[dict[str, str]] = []

    def keep(self, document: Document, n: int = 1) -> None:
        """Count a document as kept; `n` of -1 takes it back."""
        for counts in (self, self.by_source[document.source]):
            counts.update(documents=n, bytes=n * document.n_bytes)

    def reject(self, source: str, rejected: Rejected, text: str | Rejected) -> None:
        for counts in (self, self.by_source[source]):
            counts[f"rejected_{rejected.reason}"] += 1
        if counts[f"rejected_{rejected.reason}"] <= _EXAMPLES and isinstance(text, str):
            shown = " ".join(text[: 4 * _CHARACTERS].split()).encode(errors="backslashreplace").decode()
            self.examples.append({"source": source, **vars(rejected), "text": shown[:_CHARACTERS]})

    def write(self, path: Path) -> None:
        """Write the sources, and what they lost, as Markdown."""
        template = Path(__file__).with_name("collect.jinja").read_text(encoding="utf-8")
        page = jinja2.Template(template, trim_blocks=True).render(counts=self.by_source, examples=self.examples)
        write_bytes(path, page.encode() + b"\n")

"""What collect keeps and leaves out: counted, also by source, with examples; becomes `reports/collect.md`."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptpipe.base.files import write_bytes
from gptpipe.base.pages import render_markdown
from gptpipe.collect.batch import Rejected
from gptpipe.shell.errors import one_line, printable

_EXAMPLES, _CHARACTERS = 3, 200  # of each reason in each source, in the order of the source; of each example


class Tally(Counter[str]):
    """Counts of the whole corpus, and `by_source` with the first `examples` of each reason."""

    def __init__(self, sources: Iterable[str]) -> None:
        super().__init__(documents_in=0, documents=0, bytes=0, cut=0)
        self.by_source = {source: Counter(documents=0, bytes=0, cut=0) for source in sources}
        self.examples: list[dict[str, str]] = []

    def note(self) -> dict[str, Any]:
        """All of it as plain JSON, for `restore`."""
        by_source = {source: dict(counts) for source, counts in self.by_source.items()}
        return {"counts": dict(self), "by_source": by_source, "examples": list(self.examples)}

    def restore(self, note: dict[str, Any]) -> None:
        self.clear()
        self.update(note["counts"])
        self.by_source = {source: Counter(note["by_source"][source]) for source in self.by_source}
        self.examples = note["examples"]

    def documents_in(self, source: str) -> int:
        return sum(n for name, n in self.by_source[source].items() if name not in ("bytes", "cut"))

    def add(self, source: str, name: str, n: int) -> None:
        for counts in (self, self.by_source[source]):
            counts[name] += n

    def reject(self, source: str, rejected: Rejected, text: str | Rejected) -> None:
        self.add(source, name := f"rejected_{rejected.reason}", 1)
        if self.by_source[source][name] <= _EXAMPLES:
            start = text[: 4 * _CHARACTERS] if isinstance(text, str) else "(not a text)"
            shown = printable(" ".join(start.split()))[:_CHARACTERS]
            why = one_line(rejected.detail)  # it holds names of files, which JSON can only hold so
            self.examples.append({"source": source, "reason": rejected.reason, "why": why, "text": shown})

    def write(self, path: Path) -> None:
        """Write the sources, and what they lost, as Markdown."""
        page = render_markdown(Path(__file__).with_name("report.jinja"), counts=self.by_source, examples=self.examples)
        write_bytes(path, page.encode())

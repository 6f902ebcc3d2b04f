"""Counts of kept and rejected texts, by source and reason, with examples: `reports/collect.md`."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptpipe.base.files import write_bytes
from gptpipe.base.pages import render_markdown, snippet
from gptpipe.collect.batch import Rejected
from gptpipe.shell.errors import one_line

_MAX_EXAMPLES = 3  # of each reason in each source: the first
_EXAMPLE_CHARACTERS = 200


class Tally(Counter[str]):
    """Counts of the whole corpus; also counts `by_source`, and `examples` of rejected texts."""

    def __init__(self, sources: Iterable[str]) -> None:
        super().__init__(documents_in=0, documents=0, bytes=0, cut=0)
        self.by_source = {source: Counter(documents=0, bytes=0, cut=0) for source in sources}
        self.examples: list[dict[str, str]] = []

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON, for `restore`."""
        by_source = {source: dict(counts) for source, counts in self.by_source.items()}
        return {"counts": dict(self), "by_source": by_source, "examples": list(self.examples)}

    def restore(self, content: dict[str, Any]) -> None:
        self.clear()
        self.update(content["counts"])
        self.by_source = {source: Counter(content["by_source"][source]) for source in self.by_source}
        self.examples = content["examples"]

    def documents_in(self, source: str) -> int:
        """Number of texts that were read from a source."""
        return sum(n for name, n in self.by_source[source].items() if name not in ("bytes", "cut"))

    def add(self, source: str, name: str, n: int) -> None:
        for counts in (self, self.by_source[source]):
            counts[name] += n

    def reject(self, source: str, rejected: Rejected, text: str | Rejected) -> None:
        name = f"rejected_{rejected.reason}"
        self.add(source, name, 1)
        if self.by_source[source][name] <= _MAX_EXAMPLES:
            start = snippet(text, _EXAMPLE_CHARACTERS) if isinstance(text, str) else "(not a text)"
            detail = one_line(rejected.detail)  # a file name in it may not be UTF-8, which JSON needs
            self.examples.append({"source": source, "reason": rejected.reason, "why": detail, "text": start})

    def write(self, path: Path) -> None:
        """Write the counts and examples as Markdown."""
        page = render_markdown(Path(__file__).with_name("report.jinja"), counts=self.by_source, examples=self.examples)
        write_bytes(path, page.encode())

"""Counts of kept and rejected texts, by source and reason, with examples: `reports/collect.md`."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gptpipe.base.files import write_bytes
from gptpipe.base.pages import render_markdown
from gptpipe.collect.candidates import MAX_EXAMPLES, Example

_REJECTED = "rejected_"


class Tally(Counter[str]):
    """Counts of the whole corpus; also counts `by_source`, and `examples` of rejected texts."""

    def __init__(self, sources: Iterable[str]) -> None:
        super().__init__(documents_in=0, documents=0, bytes=0, cut=0)
        self.by_source = {source: Counter(documents=0, bytes=0, cut=0) for source in sources}
        self.examples: list[dict[str, str]] = []
        self._n_examples = Counter[tuple[str, str]]()  # of each source and reason

    def add(self, source: str, name: str, n: int) -> None:
        for counts in (self, self.by_source[source]):
            counts[name] += n

    def reject(self, source: str, reason: str, n: int) -> None:
        """Count `n` texts of a source as rejected."""
        self.add(source, f"{_REJECTED}{reason}", n)

    def show(self, source: str, examples: Iterable[Example]) -> None:
        """Keep the first examples of each reason for the report."""
        for example in examples:
            if self.n_missing_examples(source, example.reason):
                self._n_examples[source, example.reason] += 1
                shown = {"reason": example.reason, "why": example.detail, "text": example.start}
                self.examples.append({"source": source, **shown})

    def n_missing_examples(self, source: str, reason: str) -> int:
        return MAX_EXAMPLES - self._n_examples[source, reason]

    def documents_in(self, source: str) -> int:
        """Number of texts that were read from a source."""
        return sum(n for name, n in self.by_source[source].items() if name not in ("bytes", "cut"))

    def rejections(self, source: str | None = None) -> dict[str, int]:
        """Numbers of rejected texts by reason, the largest first: of a source, or of all."""
        counts = self if source is None else self.by_source[source]
        rejected = {name.removeprefix(_REJECTED): n for name, n in counts.items() if name.startswith(_REJECTED)}
        return dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0])))

    def write(self, path: Path) -> None:
        """Write the counts and examples as Markdown."""
        page = render_markdown(
            Path(__file__).with_name("report.jinja"), counts=self.by_source, examples=self.examples
        )
        write_bytes(path, page.encode())

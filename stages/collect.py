"""collect: text from every source, cleaned, filtered with counted reasons, deduplicated."""

from pathlib import Path

from gptpipe.stage import run_stage


def main() -> None:
    from gptpipe.config import load_params
    from gptpipe.console import say
    from gptpipe.corpus.collect import collect

    params = load_params()
    counts = collect(params.collect, Path("data/raw"), Path("reports/collect.md"))
    rejected = sum(n for name, n in counts.items() if name.startswith("rejected_"))
    say(f"collect: {counts['documents']:,} documents, {counts['bytes']:,} bytes; {rejected:,} rejected", "quiet")


if __name__ == "__main__":
    run_stage("collect", main, __doc__)

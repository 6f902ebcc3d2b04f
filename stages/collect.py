"""collect: clean, filter and deduplicate the text of all sources."""

from pathlib import Path

from gptpipe.shell.process import run_stage


def main() -> None:
    from gptpipe.collect.collect import collect
    from gptpipe.params import load_params
    from gptpipe.shell.console import say

    params = load_params()
    counts = collect(params.collect, Path("data/raw"), Path("reports/collect.md"))
    n_rejected = sum(n for name, n in counts.items() if name.startswith("rejected_"))
    say(f"collect: {counts['documents']:,} documents, {counts['bytes']:,} bytes; {n_rejected:,} rejected", "quiet")


if __name__ == "__main__":
    run_stage("collect", main, __doc__)

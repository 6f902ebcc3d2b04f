"""collect: clean, filter and deduplicate the text of all sources."""

from pathlib import Path

from gptpipe.shell.process import run_stage


def main() -> None:
    from gptpipe.collect.collect import collect
    from gptpipe.params import load_params
    from gptpipe.shell.console import say

    params = load_params()
    counts = collect(params.collect, Path("data/raw"), Path("reports/collect.md"))
    reasons = {name.removeprefix("rejected_"): n for name, n in counts.items() if name.startswith("rejected_")}
    largest_first = sorted(reasons.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in largest_first)
    rejected = f"{sum(reasons.values()):,} rejected" + (f" ({listed})" if listed else "")
    say(f"collect: {counts['documents']:,} documents, {counts['bytes']:,} bytes; {rejected}", "quiet")


if __name__ == "__main__":
    run_stage("collect", main, __doc__)

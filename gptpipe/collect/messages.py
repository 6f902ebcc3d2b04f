"""Warnings and errors of stage collect about the sources as a whole."""

from collections.abc import Iterable
from pathlib import Path

from gptpipe.collect.decide import Decider
from gptpipe.collect.params import (
    CollectParams,
    FilterParams,
    HuggingFace,
    Jsonl,
    Parquet,
    Python,
    Source,
    Text,
)
from gptpipe.collect.paths import place_of
from gptpipe.collect.tables import is_remote
from gptpipe.collect.tally import Tally
from gptpipe.shell.console import complain
from gptpipe.shell.errors import InputError

_MAX_BAD = 20  # bad records in a message
_MANY = 0.9  # share of a source's texts that are rejected for one reason, above which it may be a mistake
_WATCHED = Path("data/sources")  # the folder of local files in dvc.yaml
_ADVICE = {  # how to keep texts that were rejected for a reason
    "too_short": "lower collect.min_document_bytes, or join short texts to documents",
    "no_text": "check text_key or text_column of the source",
    "binary": "convert the files to text",
    "other_file": "name the files of this format in `paths`, or in `members` if they are in an archive",
    "lone_surrogates": "fix the escapes such as \\ud800 in the files",
    "weighted_out": "raise `weight` of the source",
    "empty": "the files contain no text; check paths, separator and members of the source",
}


def warn_about_files(paths: Iterable[list[str]], sources: Iterable[Source], stage: str) -> None:
    """Warn about everything that DVC does not watch, because it is outside data/sources. `stage` reads it.

    Sources with a SHA-256 or a revision cannot change unnoticed.
    """
    watched = _WATCHED.resolve()
    local = {path for paths_of_source in paths for path in paths_of_source}
    elsewhere: set[str] = set()
    for source in sources:
        match source:
            case HuggingFace(is_local=True):
                local.add(source.dataset)
            case Python(package=str(package)):
                elsewhere.add(f"the installed package {package}")
            case Text() | Jsonl() | Parquet():
                elsewhere.update(filter(is_remote, source.paths))
    outside = sorted(elsewhere.union(path for path in local if not _is_below(path, watched)))
    if outside:
        others = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        complain(
            f"{stage}: warning: {outside[0]}{others}: outside {_WATCHED}, so `dvc repro` does not notice "
            f"changes; copy the files there, or run `dvc repro -f {stage} && dvc repro` after a change"
        )


def _is_below(path: str, folder: Path) -> bool:
    """Whether DVC finds a file or dataset folder in `folder`. It follows links to files, not to folders."""
    is_inside = Path(place_of(path)).is_relative_to(folder) and not Path(path).is_dir()
    return is_inside or Path(path).resolve().is_relative_to(folder)


def check_bad_records(decider: Decider, params: CollectParams) -> None:
    """Raise one InputError for all bad records, unless their source skips them, or if a source has too many."""
    sources = dict(zip(decider.bad_records, params.sources, strict=True))
    stopping = [name for name, source in sources.items() if source.on_bad == "stop"]
    problems = [problem for name in stopping for problem in decider.bad_records[name]]
    if problems:
        n_more = sum(decider.n_bad[name] for name in stopping) - len(problems[:_MAX_BAD])
        raise InputError("; ".join(problems[:_MAX_BAD]) + (f"; and {n_more:,} more" if n_more else ""))
    for name, source in sources.items():
        n_bad, n_in = decider.n_bad[name], decider.tally.documents_in(name)
        if n_bad > source.max_bad * n_in:
            bad = decider.bad_records[name]
            share = (
                f"{n_bad:,} of {n_in:,} records ({n_bad / n_in:.1%}) are bad, above max_bad {source.max_bad:g}"
            )
            raise InputError(f"collect: {name}: {share}; fix the files, or raise max_bad; the first: {bad[0]}")


def warn_about_rejections(tally: Tally) -> None:
    """Warn about sources of which nearly all texts are rejected for one reason; duplicates are usual."""
    for name in tally.by_source:
        n_in = tally.documents_in(name)
        for reason, n in tally.rejections(name).items():
            if n <= _MANY * n_in:
                continue
            if reason in FilterParams.model_fields:
                complain(
                    f"collect: warning: the filter {reason} rejects {n:,} of {n_in:,} "
                    f"texts of {name}; is it meant for this language and kind of text? See reports/collect.md"
                )
            elif advice := _ADVICE.get(reason):
                complain(
                    f"collect: warning: {n:,} of {n_in:,} texts of {name} are rejected ({reason}); {advice}"
                )


def explain_empty(tally: Tally) -> str:
    """Why no document is left, and what to do."""
    rejections = tally.rejections()
    if not rejections:
        return "collect: no document left of 0: the sources are empty; add text, or check paths and members"
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in rejections.items())
    main = next(iter(rejections))
    advice = _ADVICE.get(main)
    if main in FilterParams.model_fields:
        advice = f"relax or switch off collect.filters.{main}"
    details = [example["why"] for example in tally.examples if example["reason"] == main and example["why"]]
    first = f" (the first: {details[0]})" if details else ""
    counts = f"collect: no document left of {tally['documents_in']:,} ({reasons})"
    return f"{counts}; {advice or 'see reports/collect.md'}{first}"

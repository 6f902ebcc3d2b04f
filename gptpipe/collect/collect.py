"""Stage collect: reads the sources, writes clean and distinct documents, counts every rejected text.

Three steps. Worker processes read the parts of the sources and write candidates to disk; this process decides
which of them become documents; worker processes write the shards.
"""

import shutil
from functools import partial
from pathlib import Path

import numpy as np

from gptpipe.base.files import new_file
from gptpipe.base.manifest import new_folder
from gptpipe.base.parallel import map_in_order
from gptpipe.collect.candidates import Candidates, find_candidates
from gptpipe.collect.decide import Decider, Decision
from gptpipe.collect.messages import check_bad_records, explain_empty, warn_about_files, warn_about_rejections
from gptpipe.collect.near_duplicates import SignedPart, near_duplicates
from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import Part, find_files, plan_parts
from gptpipe.collect.readers import needs_worker
from gptpipe.collect.shards import plan_shards, write_shard_of
from gptpipe.formats.corpus import shard_paths
from gptpipe.shell.console import Progress
from gptpipe.shell.errors import InputError

_PARTS = ".parts"  # folder of candidates; the finished corpus does not contain it
_CLUSTERS = ".clusters"  # temporary file of the search for near-duplicates
_MANY_BYTES = 32 << 20  # of input, above which worker processes pay off


def collect(
    params: CollectParams,
    target: Path,
    report: Path | None = None,
    stage: str = "collect",
    numbers: Path | None = None,
) -> dict[str, int]:
    """Write the corpus to `target` and the page about rejected texts to `report`; return the counts.

    Each text that is read is either kept, or counted under the reason of its rejection. After a kill or an
    error, the candidates of finished parts and the finished shards are reused, except candidates from remote
    files, which may have changed. Raises InputError if a source cannot be read or changes meanwhile, or if no
    document is left.

    Stage split collects its benchmarks with this function, too. Then warnings name `stage`, and for each
    document the number of its record in the sources is written to `numbers`.
    """
    files = find_files(params.sources)
    warn_about_files(files.paths, params.sources, stage)
    parts = plan_parts(params, files)
    is_small = sum(part.n_bytes for part in parts) < _MANY_BYTES
    kinds = [source.kind for source in params.sources]
    names = [kind if kinds.count(kind) == 1 else f"{kind}-{i}" for i, kind in enumerate(kinds)]
    decider = Decider(params, names)
    for name, others in zip(names, files.others, strict=True):
        decider.count_other_files(name, others)
    made_from = dict(files.digests)
    with new_folder(target, made_from, "collect") as folder:
        decisions = _read_and_decide(parts, decider, folder.path / _PARTS, params, is_small)
        for decision in decisions:
            made_from |= decision.record["digests"]
        check_bad_records(decider, params)
        if params.dedup == "near":
            decisions = _without_near_duplicates(
                decisions, params.near_similarity, decider, folder.path / _CLUSTERS, is_small
            )
        warn_about_rejections(decider.tally)
        if report:
            decider.tally.write(report)
        if not decider.tally["documents"]:
            raise InputError(explain_empty(decider.tally))
        if numbers:
            _write_numbers(decisions, numbers)
        n_replaced = _write_shards(decisions, folder.path, is_small)
        if params.encoding_errors == "replace":
            decider.tally["with_replacement_character"] = n_replaced
        if find_files(params.sources).digests != files.digests:
            raise InputError("collect: a source changed while it was read; rerun when nothing writes to it")
        folder.counts = dict(decider.tally)
    return folder.counts


def _read_and_decide(
    parts: list[Part], decider: Decider, folder: Path, params: CollectParams, is_small: bool
) -> list[Decision]:
    """Steps 1 and 2. Parts behind the limit of a source are not read, except a few that workers had started."""
    _remove_other_parts(folder, parts)
    read = partial(find_candidates, folder=folder, params=params)
    needed = (part for part in parts if not decider.is_full(part.source))
    isolate = any(map(needs_worker, params.sources))
    parses = _title if isolate else None
    results = map_in_order(read, needed, small=is_small, isolate=isolate, describe=_title, parses=parses)
    decisions: list[Decision] = []
    with Progress("collect", unit="parts", total=len(parts)) as progress:
        for part, record in progress.track(results):
            if decider.is_full(part.source):
                continue
            decision = decider.decide(part.source, Candidates.open(folder / part.name, record))
            while decision is None:  # more duplicates than expected: the limit of the source lies further on
                ((part, record),) = map_in_order(
                    read, [part.with_higher_limit()], isolate=isolate, parses=parses
                )
                decision = decider.decide(part.source, Candidates.open(folder / part.name, record))
            decisions.append(decision)
    return decisions


def _title(part: Part) -> str:
    return part.title


def _remove_other_parts(folder: Path, parts: list[Part]) -> None:
    """Remove what an interrupted run with other sources or parameters left."""
    reusable = {part.name for part in parts if not part.is_remote}
    for path in sorted(folder.glob("*")):
        if Part.first_name(path.name) not in reusable:
            shutil.rmtree(path)


def _without_near_duplicates(
    decisions: list[Decision], similarity: float, decider: Decider, clusters: Path, is_small: bool
) -> list[Decision]:
    signed = [SignedPart(decision.folder, decision.is_kept) for decision in decisions]
    masks = near_duplicates(signed, similarity, clusters, is_small)
    pairs = zip(decisions, masks, strict=True)
    return [decider.without_near_duplicates(decision, is_duplicate) for decision, is_duplicate in pairs]


def _write_numbers(decisions: list[Decision], path: Path) -> None:
    numbers = [np.empty(0, np.int64)]
    n_before = 0
    for decision in decisions:
        numbers_in_part, n_records = decision.record_numbers()
        numbers.append(n_before + numbers_in_part)
        n_before += n_records
    with new_file(path) as file:
        np.save(file, np.concatenate(numbers))


def _write_shards(decisions: list[Decision], folder: Path, is_small: bool) -> int:
    """Step 3. Returns the number of documents with the replacement character."""
    write = partial(write_shard_of, folder=folder)
    n_shards = n_replaced = 0
    n_documents = sum(int(decision.is_kept.sum()) for decision in decisions)
    with Progress("collect: write", unit="documents", total=n_documents) as progress:
        for counts in map_in_order(write, plan_shards(decisions), small=is_small):
            n_shards += 1
            n_replaced += counts["with_replacement_character"]
            progress.advance(counts["documents"])
    for path in shard_paths(folder)[n_shards:]:  # of an interrupted run with other parameters
        path.unlink()
    return n_replaced

"""Step 2 of collect: decides in the order of the sources which candidates become documents.

The first of equal texts is kept, and a source ends at its limit. This process sees 18 bytes of each text.
"""

from collections import Counter
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptpipe.collect.candidates import Candidates, Example, read_candidates
from gptpipe.collect.params import CollectParams
from gptpipe.collect.tally import Tally
from gptpipe.collect.texts import BAD_REASONS, Rejected

Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class Decision(NamedTuple):
    """Which candidates of a part are kept."""

    candidates: Candidates
    source: str  # its name
    is_kept: Mask  # for each candidate


class Seen:
    """A set of keys, the first 8 bytes of ids: among a billion texts, two share them with a probability of 3%.

    A key takes 8 bytes of memory, and while arrays are merged for a short time 16.
    """

    def __init__(self) -> None:
        self._levels: list[Keys] = []  # sorted arrays without common keys, each at least twice as long as the next

    def is_new(self, keys: Keys) -> Mask:
        """For each key: whether it is neither in the set nor earlier in `keys`."""
        distinct, first = np.unique(keys, return_index=True)
        is_in_set = np.zeros(len(distinct), np.bool_)
        for level in self._levels:
            positions = np.minimum(np.searchsorted(level, distinct), len(level) - 1)
            is_in_set |= level[positions] == distinct
        is_new = np.zeros(len(keys), np.bool_)
        is_new[first[~is_in_set]] = True
        return is_new

    def add(self, new_keys: Keys) -> None:
        """Add keys for which `is_new` was true."""
        if not len(new_keys):
            return
        self._levels.append(np.sort(new_keys))
        while len(self._levels) > 1 and 2 * len(self._levels[-1]) > len(self._levels[-2]):
            merged = np.concatenate([self._levels.pop(), self._levels.pop()])
            merged.sort(kind="stable")  # merges two sorted parts in linear time
            self._levels.append(merged)


class Decider:
    """Decides part after part; counts every text in `tally`."""

    def __init__(self, params: CollectParams, names: Sequence[str]) -> None:
        self.tally = Tally(names)
        self.bad_records: dict[str, list[str]] = {name: [] for name in names}  # what is wrong with them, by source
        self.n_bad = Counter[str]()  # bad records, by source
        self._params = params
        self._names = names
        self._seen = Seen()
        self._is_full = [False] * len(names)

    def count_other_files(self, name: str, paths: list[str]) -> None:
        """Count files that a glob of the source matches, and that have another format."""
        if paths:
            self.tally["documents_in"] += len(paths)
            self.tally.reject(name, "other_file", len(paths))
            self.tally.show(name, [Example.of(0, rejected, rejected) for rejected in map(_other_file, paths)])

    def is_full(self, source: int) -> bool:
        """Whether a source has reached its limit."""
        return self._is_full[source]

    def decide(self, source: int, candidates: Candidates) -> Decision | None:
        """Decide about the next part of a source; None if its reading stopped before the limit of the source."""
        name = self._names[source]
        is_candidate = candidates.reasons == 0
        keys = candidates.keys[is_candidate]
        is_kept = np.ones(len(keys), np.bool_) if self._params.dedup == "none" else self._seen.is_new(keys)
        n_texts = self._texts_to_limit(source, candidates, is_kept)
        if n_texts is None and candidates.is_cut_short:
            return None
        self._is_full[source] = n_texts is not None
        n_texts = len(candidates.reasons) if n_texts is None else n_texts
        is_read = np.flatnonzero(is_candidate) < n_texts
        is_kept &= is_read
        if self._params.dedup != "none":
            self._seen.add(keys[is_kept])
        self._count(name, candidates, n_texts, is_kept)
        self._count_duplicates(name, candidates, np.flatnonzero(is_read & ~is_kept))
        return Decision(candidates, name, is_kept)

    def _texts_to_limit(self, source: int, candidates: Candidates, is_kept: Mask) -> int | None:
        """Number of texts of a part up to the limit of its source; None if the limit is not reached."""
        limits = self._params.sources[source]
        counts = self.tally.by_source[self._names[source]]
        kept = np.flatnonzero(candidates.reasons == 0)[is_kept]  # positions of the texts
        n_documents = counts["documents"] + np.arange(1, len(kept) + 1)
        n_bytes = counts["bytes"] + candidates.n_bytes[kept].cumsum()
        is_at_limit = (n_documents >= (limits.max_documents or inf)) | (n_bytes >= (limits.max_bytes or inf))
        if not is_at_limit.any():
            return None
        return int(kept[is_at_limit.argmax()]) + 1

    def _count(self, name: str, candidates: Candidates, n_texts: int, is_kept: Mask) -> None:
        n_bytes = candidates.n_bytes[candidates.reasons == 0][is_kept]
        self.tally["documents_in"] += n_texts
        self.tally.add(name, "documents", len(n_bytes))
        self.tally.add(name, "bytes", int(n_bytes.sum()))
        self.tally.add(name, "cut", int(candidates.is_piece[:n_texts].sum()))
        for reason, n in candidates.rejections(n_texts).items():
            self.tally.reject(name, reason, n)
            self.n_bad[name] += n if reason in BAD_REASONS else 0
        self.tally.show(name, candidates.examples(n_texts))
        self.bad_records[name] += candidates.bad_records(n_texts)

    def _count_duplicates(self, name: str, candidates: Candidates, rows: npt.NDArray[np.int64]) -> None:
        if len(rows):
            self.tally.reject(name, "duplicate", len(rows))
            self._show_texts(name, "duplicate", candidates, rows)

    def without_near_duplicates(self, decision: Decision, is_duplicate: Mask) -> Decision:
        """Reject some of the kept candidates."""
        rows = np.flatnonzero(is_duplicate)
        n_bytes = decision.candidates.n_bytes[decision.candidates.reasons == 0][rows]
        self.tally.add(decision.source, "documents", -len(rows))
        self.tally.add(decision.source, "bytes", -int(n_bytes.sum()))
        if len(rows):
            self.tally.reject(decision.source, "near_duplicate", len(rows))
            self._show_texts(decision.source, "near_duplicate", decision.candidates, rows)
        return decision._replace(is_kept=decision.is_kept & ~is_duplicate)

    def _show_texts(self, name: str, reason: str, candidates: Candidates, rows: npt.NDArray[np.int64]) -> None:
        """Add the first of the rows to the examples of a reason."""
        rows = rows[: self.tally.n_missing_examples(name, reason)]
        if len(rows):
            shown = read_candidates(candidates.folder, candidates.record["batch_starts"], rows)
            texts = shown["text"].to_pylist()
            self.tally.show(name, [Example.of(0, Rejected(reason), text) for text in texts])


def _other_file(path: str) -> Rejected:
    return Rejected("other_file", path)

"""Step 2 of collect: decides in the order of the sources which candidates become documents.

The first of equal texts is kept, and a source ends at its limit. This process sees 18 bytes of each text.
"""

from collections import Counter
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from gptpipe.collect.candidates import Candidates, Example, read_candidates
from gptpipe.collect.params import CollectParams
from gptpipe.collect.tally import Tally
from gptpipe.collect.texts import BAD_REASONS, Rejected

Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
_MIN_FILTER_BITS = 1 << 16
_KEYS_AT_ONCE = 1 << 20  # that are added to the filter


class Decision(NamedTuple):
    """Which candidates of a part are kept."""

    folder: Path
    record: dict[str, Any]  # of the candidates
    source: str  # its name
    is_kept: Mask  # for each candidate

    def record_numbers(self) -> tuple[npt.NDArray[np.int64], int]:
        """For each kept candidate the number of its record in the part, and how many records the part has.

        Records are counted from 1. Pieces of a record have its number. A file that is skipped is no record.
        """
        candidates = self.candidates
        is_record = candidates.is_piece == 0
        if "other_file" in self.record["reasons"]:
            is_record &= candidates.reasons != 1 + self.record["reasons"].index("other_file")
        numbers = is_record.cumsum()
        return numbers[candidates.reasons == 0][self.is_kept], int(is_record.sum())

    @property
    def candidates(self) -> Candidates:
        """Opened at each use, because the system limits the number of files that a process has mapped."""
        return Candidates.open(self.folder, self.record)


class Seen:
    """A set of keys, the first 8 bytes of ids: among a billion texts, two share them with a probability of 3%.

    A key takes 9 to 10 bytes of memory, and while arrays are merged for a short time 8 more.
    """

    def __init__(self) -> None:
        # Sorted arrays without common keys, each at least twice as long as the next.
        self._levels: list[Keys] = []
        self._filter = _Filter(_MIN_FILTER_BITS)

    def is_new(self, keys: Keys) -> Mask:
        """For each key: whether it is neither in the set nor earlier in `keys`."""
        is_new = np.logical_not(pd.Series(keys).duplicated().to_numpy())
        positions = np.flatnonzero(self._filter.may_contain(keys))
        # In ascending order, keys are found many times faster.
        positions = positions[np.argsort(keys[positions])]
        is_new[positions[self._contains(keys[positions])]] = False
        return is_new

    def _contains(self, keys: Keys) -> Mask:
        is_in_set = np.zeros(len(keys), np.bool_)
        for level in self._levels:
            positions = np.minimum(np.searchsorted(level, keys), len(level) - 1)
            is_in_set |= level[positions] == keys
        return is_in_set

    def add(self, new_keys: Keys) -> None:
        """Add keys for which `is_new` was true."""
        if not len(new_keys):
            return
        new_keys = np.sort(new_keys)
        self._levels.append(new_keys)
        while len(self._levels) > 1 and 2 * len(self._levels[-1]) > len(self._levels[-2]):
            merged = np.concatenate([self._levels.pop(), self._levels.pop()])
            merged.sort(kind="stable")  # merges two sorted parts in linear time
            self._levels.append(merged)
        n_keys = sum(map(len, self._levels))
        if 8 * n_keys <= self._filter.n_bits:
            self._filter.add(new_keys)
        else:
            self._filter = _Filter(2 ** (16 * n_keys - 1).bit_length() // 2)
            for level in self._levels:
                self._filter.add(level)


class _Filter:
    """Which beginnings of keys occur: a bit for each. Most keys are new; this tells faster than a search."""

    def __init__(self, n_bits: int) -> None:
        """`n_bits` is a power of two."""
        self.n_bits = n_bits
        self._shift = np.uint64(64 - (n_bits.bit_length() - 1))
        self._bytes = np.zeros(n_bits // 8, np.uint8)

    def may_contain(self, keys: Keys) -> Mask:
        """False for a key that was not added; true for up to one in eight of them, and for all that were."""
        begins = keys >> self._shift
        return np.asarray(self._bytes[begins >> np.uint64(3)] & _bit(begins) != 0)

    def add(self, keys: Keys) -> None:
        """Add sorted keys."""
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            begins = keys[start : start + _KEYS_AT_ONCE] >> self._shift
            places = begins >> np.uint64(3)
            is_first = np.append(True, places[1:] != places[:-1])  # of the keys with bits in the same byte
            firsts = np.flatnonzero(is_first)
            self._bytes[places[firsts]] |= np.bitwise_or.reduceat(_bit(begins), firsts)


def _bit(begins: Keys) -> npt.NDArray[np.uint8]:
    """The place of each beginning in its byte."""
    return np.left_shift(np.uint8(1), (begins & np.uint64(7)).astype(np.uint8))


class Decider:
    """Decides part after part; counts every text in `tally`."""

    def __init__(self, params: CollectParams, names: Sequence[str]) -> None:
        self.tally = Tally(names)
        # What is wrong with them, by source.
        self.bad_records: dict[str, list[str]] = {name: [] for name in names}
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
        """Decide about the next part of a source; None if its reading stopped before the source's limit."""
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
        return Decision(candidates.folder, candidates.record, name, is_kept)

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
        candidates = decision.candidates
        n_bytes = candidates.n_bytes[candidates.reasons == 0][rows]
        self.tally.add(decision.source, "documents", -len(rows))
        self.tally.add(decision.source, "bytes", -int(n_bytes.sum()))
        if len(rows):
            self.tally.reject(decision.source, "near_duplicate", len(rows))
            self._show_texts(decision.source, "near_duplicate", candidates, rows)
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

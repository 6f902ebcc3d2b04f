"""Which candidates become documents: the first of equal keys, up to the limit of the source."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptpipe.collect.candidates import Candidates, find_candidates
from gptpipe.collect.decide import Decider, Decision, Seen
from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import Part, find_files, plan_parts

MakeParams = Callable[..., CollectParams]


def test_seen_keys_are_found_in_any_order() -> None:
    """The reference is a set. Some keys are the smallest or largest that exist, and many are added twice."""
    random_, seen, reference = random.Random(0), Seen(), set[int]()
    keys = [random_.choice((0, 2**64 - 900)) + random_.randrange(900) for _ in range(2000)]
    for start in range(0, len(keys), 37):
        some = keys[start : start + 37]
        expected = [key not in reference and key not in some[:i] for i, key in enumerate(some)]
        array = np.array(some, np.uint64)
        is_new = seen.is_new(array)
        assert is_new.tolist() == expected
        seen.add(array[is_new])
        reference.update(some)
    assert len(reference) > 1000


def test_a_key_is_seen_only_after_it_was_added() -> None:
    """A source may end before a key that was new."""
    seen, keys = Seen(), np.array([3, 1, 3], np.uint64)
    for _ in range(2):
        assert seen.is_new(keys).tolist() == [True, True, False]
    seen.add(keys[:1])
    assert seen.is_new(keys).tolist() == [False, True, False]
    seen.add(keys[:0])
    assert seen.is_new(keys[:0]).tolist() == []


def test_seen_keeps_few_arrays() -> None:
    """Each lookup searches all of them."""
    seen = Seen()
    for start in range(0, 64_000, 64):
        seen.add(np.arange(start, start + 64, dtype=np.uint64))
    assert len(seen._levels) <= 10
    assert sum(map(len, seen._levels)) == 64_000
    assert not seen.is_new(np.arange(64_000, dtype=np.uint64)).any()


def test_most_new_keys_are_not_searched() -> None:
    """Searching takes many times longer than the filter, which takes one or two bytes a key."""
    random_, seen = np.random.default_rng(0), Seen()
    for _ in range(50):
        seen.add(random_.integers(0, 2**64, 1000, np.uint64))
        assert seen._filter.n_bits <= 16 * 50_000
    assert seen._filter.may_contain(random_.integers(0, 2**64, 10_000, np.uint64)).mean() < 1 / 8


@pytest.fixture
def decide(tmp_path: Path, collect_params: MakeParams) -> Callable[..., tuple[Decider, list[Decision | None]]]:
    """Write a JSON array of values for each source, one line each; decide about them in order."""

    def run(*sources: tuple[str, dict[str, Any]], **keys: Any) -> tuple[Decider, list[Decision | None]]:
        named = []
        for i, (lines, options) in enumerate(sources):
            (tmp_path / f"{i}.txt").write_text(lines)
            named.append({"kind": "text", "paths": (f"{tmp_path}/{i}.txt",), "document": "line", **options})
        params = collect_params(*named, **keys)
        decider = Decider(params, [f"s{i}" for i in range(len(named))])
        decisions = [decider.decide(part.source, found(part, params)) for part in parts_of(params)]
        return decider, decisions

    def found(part: Part, params: CollectParams) -> Candidates:
        _, record = find_candidates(part, folder=tmp_path / "parts", params=params)
        return Candidates.open(tmp_path / "parts" / part.name, record)

    return run


def parts_of(params: CollectParams) -> list[Part]:
    return plan_parts(params, find_files(params.sources))


def kept(decision: Decision | None) -> list[bool]:
    assert decision is not None
    return decision.is_kept.tolist()


def test_the_first_of_equal_texts_is_kept_across_sources(decide) -> None:
    decider, decisions = decide(("a\nb\na\n", {}), ("b\nc\n", {}))
    assert [kept(decision) for decision in decisions] == [[True, True, False], [False, True]]
    assert decider.tally["rejected_duplicate"] == 2
    assert [example["text"] for example in decider.tally.examples] == ["a", "b"]
    _, decisions = decide(("a\nb\na\n", {}), ("b\nc\n", {}), dedup="none")
    assert [kept(decision) for decision in decisions] == [[True] * 3, [True] * 2]


def test_texts_behind_a_limit_are_neither_counted_nor_remembered(decide) -> None:
    """A worker has read them, because the limit counts documents and the first of these is a duplicate."""
    decider, decisions = decide(("a\nb\n", {}), ("a\n\nc\nd\n", {"max_documents": 1}), ("d\n", {}))
    assert decisions[1] is None  # the worker stopped reading at the duplicate, so the part must be read further
    decider, decisions = decide(("c\nd\n", {"max_bytes": 1}), ("d\n", {}))
    assert kept(decisions[0])[:1] == [True]
    assert sum(kept(decisions[0])) == 1
    assert decider.is_full(0)
    assert not decider.is_full(1)
    assert kept(decisions[1]) == [True]
    assert (decider.tally["documents_in"], decider.tally["documents"]) == (2, 2)


def test_each_text_is_kept_or_counted(decide) -> None:
    decider, (decision,) = decide(("one\n\ntwo\none\nx\n\n", {}), min_document_bytes=2)
    assert kept(decision) == [True, True, False]
    assert dict(decider.tally) == {
        "documents_in": 6,
        "documents": 2,
        "bytes": 6,
        "cut": 0,
        "rejected_empty": 2,
        "rejected_too_short": 1,
        "rejected_duplicate": 1,
    }
    assert decider.tally.documents_in("s0") == 6


def test_a_weight_chooses_by_id_whatever_the_other_texts_are(decide) -> None:
    lines = [f"line {i}" for i in range(400)]
    chosen = {line for line in lines if int.from_bytes(hashlib.sha256(line.encode()).digest()[-4:]) < 2**30}
    for some in (lines, lines[100:]):
        decider, (decision,) = decide(("\n".join(some) + "\n", {"weight": 0.25}))
        assert decider.tally["documents"] == len(chosen.intersection(some)) == sum(kept(decision))
        assert decider.tally["rejected_weighted_out"] == len(some) - len(chosen.intersection(some))


def test_near_duplicates_leave_the_counts(decide) -> None:
    decider, (decision,) = decide(("one\ntwo\nthree\n", {}))
    decision = decider.without_near_duplicates(decision, np.array([False, True, False]))
    assert kept(decision) == [True, False, True]
    tally = decider.tally
    assert (tally["documents"], tally["bytes"], tally["rejected_near_duplicate"]) == (2, 8, 1)
    assert tally.examples[-1] == {"source": "s0", "reason": "near_duplicate", "why": "", "text": "two"}

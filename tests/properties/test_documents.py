"""Sides of the split and deduplication: the result for a document does not depend on the rest of the corpus."""

import hashlib
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sections import split_params

from gptpipe.collect.collect import collect
from gptpipe.collect.decide import Seen
from gptpipe.formats.corpus import shard_paths
from gptpipe.formats.sides import SIDES, sides_of

IDS = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(300)]
some_ids = st.lists(st.sampled_from(IDS), min_size=1, max_size=60)
shares = st.floats(0, 0.49)
seeds = st.integers(0, 2**63 - 1)
# Sentences from few phrases: many are equal or nearly equal.
sentences = st.lists(
    st.sampled_from(["the old cat", "the red dog", "sees", "a tree", "and runs"]), min_size=1, max_size=9
)


@given(some_ids, st.randoms(use_true_random=False), shares, shares, seeds)
def test_a_side_depends_only_on_the_document_and_the_seed(
    documents: list[str], random: Random, val: float, test: float, seed: int
) -> None:
    params = split_params(val_fraction=val, test_fraction=test)
    alone = {document: sides_of([document], params.fractions, seed)[0] for document in documents}
    order = [*documents, *IDS[: random.randrange(len(IDS))]]
    random.shuffle(order)
    together = dict(zip(order, sides_of(order, params.fractions, seed), strict=True))
    assert {document: together[document] for document in documents} == alone


@given(some_ids, st.tuples(shares, shares).map(sorted), shares, seeds)
def test_a_larger_fraction_takes_documents_from_train_only(
    documents: list[str], grows: list[float], other: float, seed: int
) -> None:
    for side, name, fixed in (
        ("val", "val_fraction", "test_fraction"),
        ("test", "test_fraction", "val_fraction"),
    ):
        before, after = (
            sides_of(documents, split_params(**{name: share, fixed: other}).fractions, seed) for share in grows
        )
        moves = {(SIDES[one], SIDES[two]) for one, two in zip(before, after, strict=True) if one != two}
        assert moves <= {("train", side)}


@given(st.lists(st.lists(st.integers(0, 20), max_size=8), max_size=12))
def test_seen_reports_exactly_the_earlier_documents(batches: list[list[int]]) -> None:
    seen, known = Seen(), set[int]()
    for batch in batches:
        expected = []
        for key in batch:
            expected.append(key not in known)
            known.add(key)
        keys = np.array(batch, np.uint64)
        is_new = seen.is_new(keys)
        assert is_new.tolist() == expected
        seen.add(keys[is_new])


def collected(texts: list[str], dedup: str) -> list[str]:
    """The texts that stage collect keeps, in order."""
    with tempfile.TemporaryDirectory() as name:
        source, raw = Path(name, "texts.txt"), Path(name, "raw")
        source.write_text("\n".join(texts))
        collect(tiny.params((str(source),), collect__dedup=dedup).collect, raw)
        return [text for shard in shard_paths(raw) for text in pq.read_table(shard)["text"].to_pylist()]


@pytest.mark.parametrize("dedup", ["exact", "near"])
@given(texts=st.lists(sentences.map(" ".join), min_size=1, max_size=40))
@settings(max_examples=12)
def test_deduplicating_twice_changes_nothing(dedup: str, texts: list[str]) -> None:
    kept = collected(texts, dedup)
    assert len(set(kept)) == len(kept)
    assert set(kept) == set(texts) if dedup == "exact" else set(kept) <= set(texts)
    assert collected(kept, dedup) == kept


@given(
    texts=st.lists(sentences.map(" ".join), min_size=1, max_size=20), random=st.randoms(use_true_random=False)
)
@settings(max_examples=8)
def test_the_order_of_documents_does_not_change_the_set_that_is_kept(texts: list[str], random: Random) -> None:
    kept = collected(texts, "exact")
    random.shuffle(texts)
    assert sorted(collected(texts, "exact")) == sorted(kept)

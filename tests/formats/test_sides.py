"""Sides of documents: a pure function of (document id, seed)."""

import hashlib
import subprocess
import sys

import pyarrow as pa
import pytest
from sections import side_of, split_params

from gptpipe.formats.sides import SIDES, Fractions, sides_of, sides_of_column

IDS = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(20_000)]
KNOWN = ["test", "train", "train", "train", "test", "test", "test", "val", "test", "train", "train", "train"]


def sides(val: float, test: float, seed: int = 0) -> dict[str, str]:
    params = split_params(val_fraction=val, test_fraction=test)
    return {document_id: side_of(document_id, params, seed) for document_id in IDS}


def test_sides_of_known_ids() -> None:
    """Literal values, because a change of the function moves documents between existing splits."""
    first = list(sides(0.3, 0.3).values())[:12]
    assert first == KNOWN


def test_sides_are_the_same_in_another_process() -> None:
    program = """
import hashlib
from gptpipe.split.params import SplitParams
from gptpipe.formats.sides import SIDES, sides_of
params = SplitParams(val_fraction=0.3, test_fraction=0.3, ngram=13, benchmarks=(), max_contamination=None)
ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(12)]
print(*[SIDES[i] for i in sides_of(ids, params.fractions, 0)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == KNOWN


def test_a_column_of_ids_has_the_same_sides_as_a_list() -> None:
    """Also a part of a column, which has an offset."""
    fractions = Fractions(0.2, 0.3)
    column = pa.array(IDS[:100])
    for start, stop in ((0, 100), (7, 50), (99, 100)):
        expected = sides_of(IDS[start:stop], fractions, 3).tolist()
        assert sides_of_column(column[start:stop], fractions, 3).tolist() == expected


@pytest.mark.parametrize(("val", "test"), [(0.05, 0.05), (0.1, 0.0), (0.0, 0.1), (0.3, 0.2)])
def test_sides_have_about_their_fractions_of_the_documents(val: float, test: float) -> None:
    assigned = list(sides(val, test).values())
    for side, share in zip(SIDES, (1 - val - test, val, test), strict=True):
        deviation = (share * (1 - share) / len(assigned)) ** 0.5
        assert abs(assigned.count(side) / len(assigned) - share) <= 4 * deviation


def test_a_fraction_of_zero_gives_an_empty_side() -> None:
    assert set(sides(0.1, 0.0).values()) == {"train", "val"}
    assert set(sides(0.0, 0.0).values()) == {"train"}


def test_more_validation_takes_documents_only_from_train() -> None:
    less, more = sides(0.05, 0.1), sides(0.2, 0.1)
    moves = {(less[i], more[i]) for i in IDS}
    assert moves == {("train", "train"), ("train", "val"), ("val", "val"), ("test", "test")}


def test_more_test_takes_documents_only_from_train() -> None:
    less, more = sides(0.1, 0.05), sides(0.1, 0.2)
    moves = {(less[i], more[i]) for i in IDS}
    assert moves == {("train", "train"), ("train", "test"), ("val", "val"), ("test", "test")}


def test_another_seed_gives_another_split() -> None:
    here, there = sides(0.1, 0.1, seed=0), sides(0.1, 0.1, seed=1)
    held_out = [i for i in IDS if here[i] == "val"]
    assert 0.05 < sum(there[i] == "val" for i in held_out) / len(held_out) < 0.15

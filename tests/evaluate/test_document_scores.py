"""The paired difference of two models over documents, and how it is stored."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gptpipe.evaluate.document_scores import Difference, paired_difference, read_scores, write_scores
from gptpipe.shell.errors import IntegrityError


def table(bits: list[float], n_bytes: list[int], side: str = "test") -> pd.DataFrame:
    ids = [f"{i:02}" for i in range(len(bits))]
    nats = np.array(bits) * np.log(2)
    return pd.DataFrame({"split": side, "id": ids, "source": "s", "n_bytes": n_bytes, "nats": nats})


def test_the_difference_of_two_models_and_its_error() -> None:
    """Differences of 2, 4 and 0 bits in 10, 10 and 20 bytes: 6 / 40 = 0.15.

    Residuals are 0.5, 2.5 and -3; the error is sqrt(3 / 2 * (0.25 + 6.25 + 9)) / 40 = 0.12055.
    """
    first, second = table([12, 14, 30], [10, 10, 20]), table([10, 10, 30], [10, 10, 20])
    found = paired_difference(first, second.sample(frac=1, random_state=1), "test")  # in another order
    assert found is not None
    assert found.bits_per_byte == pytest.approx(0.15)
    assert found.standard_error == pytest.approx(0.120545, rel=1e-4)
    assert found.n_documents == 3
    assert str(found) == "+0.1500 ± 0.1205 bits per byte on the same 3 documents"


def test_pairing_cancels_what_documents_have_in_common() -> None:
    """Documents differ by a factor of ten, the models by 1% in each."""
    bits = list(np.linspace(10, 100, 30))
    found = paired_difference(table([0.99 * b for b in bits], [40] * 30), table(bits, [40] * 30), "test")
    assert found is not None
    assert found.is_lower


@pytest.mark.parametrize(
    ("difference", "is_lower"),
    [
        (Difference(-0.21, 0.1, 50), True),
        (Difference(-0.2, 0.1, 50), False),  # exactly two errors
        (Difference(0.21, 0.1, 50), False),
        (Difference(0.0, 0.0, 50), False),
        (Difference(-0.5, 0.0, 1), False),  # the error of one document is unknown
    ],
)
def test_a_model_is_better_beyond_two_standard_errors(difference: Difference, is_lower: bool) -> None:
    assert difference.is_lower is is_lower


def test_other_documents_are_not_compared() -> None:
    first = table([1, 2], [10, 10])
    for other in (
        table([1], [10]),
        table([1, 2], [10, 11]),
        table([1, 2], [10, 10], "val"),
        first.assign(id=["a", "b"]),
    ):
        assert paired_difference(first, other, "test") is None
    assert paired_difference(first, first, "val") is None


def test_scores_are_stored_exactly_and_damage_is_noticed(tmp_path: Path) -> None:
    scores = table([0.1, 1e-300, 3.3], [10, 10, 2**40])
    write_scores(tmp_path / "documents", scores, "d")
    pd.testing.assert_frame_equal(
        read_scores(tmp_path / "documents"), scores, check_exact=True, check_dtype=False
    )
    (tmp_path / "documents/scores.parquet").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"scores.parquet: differs"):
        read_scores(tmp_path / "documents")
    write_scores(tmp_path / "none", scores.head(0), "d")
    assert read_scores(tmp_path / "none").empty

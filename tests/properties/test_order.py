"""Windows cover the tokens, and their order is a permutation for any seed, epoch and number of ranks."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptpipe.train.batches import Batches, Permutation
from gptpipe.train.distributed import batch_slice
from gptpipe.train.params import TrainParams


@st.composite
def shapes(draw: st.DrawFn) -> Batches:
    """Streams whose tokens are their own positions, so that a window shows its position."""
    context_length = draw(st.integers(2, 20))
    n_tokens = draw(st.integers(context_length + 1, 200))
    return Batches(
        np.arange(n_tokens, dtype=draw(st.sampled_from([np.uint16, np.uint32]))),
        context_length=context_length,
        stride=draw(st.integers(1, context_length)),
        batch_size=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def starts_of_epoch(batches: Batches, epoch: int) -> list[int]:
    """The starts of the windows of one epoch, in order."""
    first, last = epoch * batches.n_windows, (epoch + 1) * batches.n_windows
    steps = range(first // batches.batch_size, -(-last // batches.batch_size))
    starts = np.concatenate([batches.starts_at(step) for step in steps])
    offset = first - steps[0] * batches.batch_size
    return starts[offset : offset + batches.n_windows].tolist()


@given(shapes(), st.integers(0, 50))
def test_windows_cover_the_stream_once_per_epoch(batches: Batches, epoch: int) -> None:
    n_tokens, context_length, stride = len(batches.tokens), batches.context_length, batches.stride
    starts = sorted(starts_of_epoch(batches, epoch))
    last = n_tokens - context_length - 1
    assert starts == sorted({*range(0, last, stride), last})  # the last window ends with the stream
    targets = {position for start in starts for position in range(start + 1, start + context_length + 1)}
    assert targets == set(range(1, n_tokens))  # every token but the first is predicted


@given(shapes(), st.integers(0, 10_000))
def test_targets_are_the_tokens_one_position_on(batches: Batches, step: int) -> None:
    tokens, targets = batches.at(step)
    assert tokens.shape == targets.shape == (batches.batch_size, batches.context_length)
    expected = torch.from_numpy(batches.starts_at(step))[:, None] + torch.arange(batches.context_length)
    assert torch.equal(tokens, expected)
    assert torch.equal(targets, expected + 1)


@given(st.integers(1, 3000), st.text(max_size=20))
def test_a_permutation_is_a_bijection(n: int, key: str) -> None:
    assert sorted(Permutation(n, key)(np.arange(n)).tolist()) == list(range(n))


@given(st.integers(1, 2**62), st.text(max_size=20), st.sets(st.integers(0, 2**62), min_size=1, max_size=20))
def test_a_permutation_of_a_large_range_stays_inside_and_repeats_nothing(
    n: int, key: str, drawn: set[int]
) -> None:
    positions = sorted({position % n for position in drawn})
    images = Permutation(n, key)(np.array(positions)).tolist()
    assert len(set(images)) == len(positions)
    assert all(0 <= image < n for image in images)


@given(shapes(), st.integers(1, 8), st.integers(1, 4), st.integers(0, 500))
def test_ranks_divide_each_batch(batches: Batches, n_ranks: int, n_each: int, step: int) -> None:
    """The parts of all ranks, in order, are the batch of a single process."""
    batches.batch_size = n_ranks * n_each
    params = TrainParams(**{**tiny.TRAIN, "batch_size": batches.batch_size})
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "any")
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        patch.setenv("WORLD_SIZE", str(n_ranks))
        for rank in range(n_ranks):
            patch.setenv("RANK", str(rank))
            parts.append(batches.at(step, batch_slice(params)))
    tokens, targets = batches.at(step)
    assert torch.equal(torch.cat([part[0] for part in parts]), tokens)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)

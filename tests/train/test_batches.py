"""The order of training windows: a keyed permutation, asked position by position."""

from collections import Counter

import numpy as np
import pytest
import torch

from gptpipe.shell.errors import InputError
from gptpipe.train.batches import Batches, Permutation

# 13 tokens after the first window's start: windows at 0, 3, 6 and 8, the last moved back to the stream's end.
STREAM = np.arange(100, 113, dtype=np.uint16)
KNOWN_ORDER = [5, 1, 9, 3, 6, 0, 8, 7, 2, 4]


def batches(tokens: np.ndarray = STREAM, *, batch_size: int = 3, seed: int = 0, stride: int = 3) -> Batches:
    return Batches(tokens, context_length=4, stride=stride, batch_size=batch_size, seed=seed)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097, 100_000])
def test_a_permutation_is_a_bijection(n: int) -> None:
    images = Permutation(n, "key")(np.arange(n))
    assert images.dtype == np.int64
    assert sorted(images) == list(range(n))


def test_any_position_can_be_computed_alone() -> None:
    permutation = Permutation(1000, "key")
    together = permutation(np.arange(1000))
    assert [int(permutation(np.array([i]))[0]) for i in range(1000)] == list(together)


def test_different_keys_give_different_orders_and_equal_keys_equal_ones() -> None:
    positions = np.arange(1000)
    orders = [Permutation(1000, f"0:{epoch}")(positions) for epoch in range(20)]
    assert np.array_equal(orders[0], Permutation(1000, "0:0")(positions))
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 20  # one match in a thousand positions is to be expected


def test_a_known_order() -> None:
    """A literal order, because a resumed training must continue in the same one."""
    assert Permutation(10, "0:0")(np.arange(10)).tolist() == KNOWN_ORDER


def test_a_large_range_needs_no_memory() -> None:
    n = 2**40 + 7
    images = Permutation(n, "key")(np.array([0, 1, n - 1]))
    assert len(set(images.tolist())) == 3
    assert all(0 <= image < n for image in images.tolist())


def test_small_permutations_are_uniform() -> None:
    """Each of the six orders of three occurs about equally often."""
    orders = Counter(tuple(Permutation(3, str(key))(np.arange(3)).tolist()) for key in range(3000))
    assert len(orders) == 6
    assert all(400 < n < 600 for n in orders.values())


def test_windows_start_every_stride_and_the_last_ends_with_the_stream() -> None:
    assert batches().n_windows == 4
    starts = batches(batch_size=4).starts_at(0)
    assert sorted(starts) == [0, 3, 6, 8]
    _, targets = batches(batch_size=4).at(0)
    assert targets.max() == STREAM[-1]
    assert sorted(batches(batch_size=3, stride=4).starts_at(0)) == [0, 4, 8]  # nothing to move


def test_every_window_once_per_epoch_and_batches_cross_epochs() -> None:
    for batch_size in (1, 3, 4, 7, 12):
        source = batches(batch_size=batch_size)
        starts = np.concatenate([source.starts_at(step) for step in range(12)])
        for epoch in range(len(starts) // 4):
            assert sorted(starts[4 * epoch : 4 * epoch + 4]) == [0, 3, 6, 8]
    epochs = [tuple(batches(batch_size=4).starts_at(step)) for step in range(10)]
    assert len(set(epochs)) > 3  # another order each time


def test_a_batch_depends_on_its_step_alone() -> None:
    forwards = batches()
    wanted = [forwards.at(step)[0] for step in range(8)]
    for step in (5, 0, 7, 7, 2):
        assert torch.equal(batches().at(step)[0], wanted[step])
    assert not all(torch.equal(batches(seed=1).at(step)[0], wanted[step]) for step in range(8))


def test_batch_size_does_not_change_the_order() -> None:
    one = np.concatenate([batches(batch_size=2).starts_at(step) for step in range(6)])
    other = np.concatenate([batches(batch_size=6).starts_at(step) for step in range(2)])
    assert np.array_equal(one, other)


def test_targets_are_the_next_tokens() -> None:
    tokens, targets = batches().at(0)
    assert tokens.shape == targets.shape == (3, 4)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(targets, tokens + 1)  # in this stream each token is one more than the one before
    assert torch.equal(tokens[:, 0], torch.from_numpy(batches().starts_at(0)) + 100)


def test_large_token_ids_survive() -> None:
    tokens, _ = batches(np.arange(200_000, 200_013, dtype=np.uint32)).at(0)
    assert tokens.min() >= 200_000


def test_one_window_is_enough_and_less_is_an_input_error() -> None:
    only = batches(STREAM[:5], batch_size=2)
    assert only.n_windows == 1
    assert only.at(3)[0].tolist() == [[100, 101, 102, 103]] * 2
    with pytest.raises(InputError, match="the train split has 4 tokens, one window needs 5"):
        batches(STREAM[:4])

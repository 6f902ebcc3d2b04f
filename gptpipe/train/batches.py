"""Which windows of the train stream an optimizer step sees: a pure function of (seed, epoch, step).

There is no loader and no state. A keyed permutation puts the windows of an epoch in random order, and any
position of it can be asked for at once; so a resumed training, and any number of data-parallel ranks, see the
same order.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptpipe.base.hashing import mix64
from gptpipe.shell.errors import InputError

# Of a balanced Feistel network; four already pass for a random permutation (Luby and Rackoff, 1988).
_ROUNDS = 6


class Permutation:
    """A bijection on range(n) drawn by a key, computed position by position in O(1) memory.

    A Feistel network permutes the next power of four; what falls outside range(n) is sent through it again
    until it falls inside (cycle walking, Black and Rogaway, 2002), on average fewer than four times.
    """

    def __init__(self, n: int, key: str) -> None:
        self.n = n
        self._half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Images of positions, each in range(n)."""
        values = self._encipher(positions.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (mix64(right ^ key) & self._mask)
        return (left << self._half_bits) | right


class Batches:
    """Windows of `context_length` tokens, cut every `stride` tokens, in batches of `batch_size` windows.

    Every window is seen once per epoch; a batch may hold the end of one epoch and the start of the next. The
    last window is moved back so that it ends with the stream.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        *,
        context_length: int,
        stride: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.tokens, self.context_length, self.stride = tokens, context_length, stride
        self.batch_size, self.seed = batch_size, seed
        self._last_start = len(tokens) - context_length - 1
        if self._last_start < 0:
            raise InputError(
                f"the train split has {len(tokens)} tokens, one window needs {context_length + 1}: "
                "add text, or lower model.context_length"
            )
        self.n_windows = -(-self._last_start // stride) + 1

    def starts_at(self, step: int) -> npt.NDArray[np.int64]:
        """Positions in the stream where the windows of a step start; step counts from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, within = np.divmod(positions, self.n_windows)
        starts = np.empty_like(positions)
        for epoch in np.unique(epochs):
            order = Permutation(self.n_windows, f"{self.seed}:{epoch}")
            starts[epochs == epoch] = order(within[epochs == epoch]) * self.stride
        return np.minimum(starts, self._last_start)

    def at(self, step: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a step or part of it, int64 (B, T) each; targets are the next tokens."""
        windows = np.stack([self.tokens[s : s + self.context_length + 1] for s in self.starts_at(step)[part]])
        window_tensor = torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)
        return window_tensor[:, :-1].contiguous(), window_tensor[:, 1:].contiguous()

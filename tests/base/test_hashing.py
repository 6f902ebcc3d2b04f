"""SplitMix64 against published values."""

import numpy as np

from gptpipe.base.hashing import GAMMA, mix64


def test_mix64_gives_the_outputs_of_splitmix64() -> None:
    """The first three outputs of the reference (https://prng.di.unimi.it/splitmix64.c) for seed 0."""
    states = np.array([GAMMA, 2 * GAMMA % 2**64, 3 * GAMMA % 2**64], dtype=np.uint64)
    assert [hex(output) for output in mix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]

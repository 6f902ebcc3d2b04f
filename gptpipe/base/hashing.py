"""SplitMix64: an integer hash (Steele, Lea and Flood, 2014, doi:10.1145/2714064.2660195)."""

import numpy as np
import numpy.typing as npt

GAMMA = 0x9E3779B97F4A7C15  # the generator's step between two states


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64, a bijection on 64-bit integers.

    Every input bit affects every output bit.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

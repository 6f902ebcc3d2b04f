"""How the loss of a training depends on the size of the network, the tokens, and the passes over the text.

    L(N, D') = E + A / N^a + B / D'^b            (Hoffmann et al., 2022, arXiv:2203.15556, eq. 2)
    D' = U + U R (1 - exp(-(D / U - 1) / R))     (Muennighoff et al., 2023, arXiv:2305.16264, eq. 5)

N counts the parameters that are multiplied with every token, D the tokens of the training, U those of the text.
Further passes over the text are worth less and less; R says how many of them are worth about as much as new
text. docs/parameters.md says from which trainings the constants are.
"""

import math

# In bits per byte of the default text. For another text, the law is multiplied by a factor.
_E = 0.5
_A, _N_EXPONENT = 30.0, 0.353
_B, _D_EXPONENT = 100.0, 0.353
_R, _R_WITH_DROPOUT = 4.0, 15.0


def relative_loss(n_parameters: float, n_tokens: float, n_train_tokens: float, *, has_dropout: bool) -> float:
    """L for a text of `n_train_tokens` tokens. Only ratios of its values mean something."""
    useful = useful_tokens(n_tokens, n_train_tokens, _R_WITH_DROPOUT if has_dropout else _R)
    return _E + _A * n_parameters**-_N_EXPONENT + _B * useful**-_D_EXPONENT


def useful_tokens(n_tokens: float, n_different: float, r: float) -> float:
    """D': the number of new tokens that teach as much as `n_tokens` tokens with repetitions."""
    n_repeats = n_tokens / n_different - 1
    if n_repeats <= 0:
        return n_tokens
    return n_different * (1 + r * (1 - math.exp(-n_repeats / r)))

"""How the loss of a training depends on the size of the network, the tokens, and the passes over the text.

    L(N, D') = E + A / N^a + B / D'^b            (Hoffmann et al., 2022, arXiv:2203.15556, eq. 2)
    D' = U + U R (1 - exp(-(D / U - 1) / R))     (Muennighoff et al., 2023, arXiv:2305.16264, eq. 5)
    R = min(15.4, C (U / N)^c)

N counts the parameters that are multiplied with every token, D the tokens of the training, U those of the text.
Further passes over the text are worth less and less; R says how many of them are worth about as much as new
text. A large network learns a small text by heart, so R falls with N. docs/parameters.md says from which
trainings the constants are.
"""

import math

# In bits per byte of the default text. For another text, the law is multiplied by a factor.
_E, _A, _B = 0.988, 0.176, 0.499  # N and D in millions
_EXPONENT = 0.353  # a and b of Muennighoff et al.
_MAX_R = 15.4  # of Muennighoff et al.
_C, _C_EXPONENT = 35.0, 1.5
_MILLION = 1e6


def relative_loss(n_parameters: float, n_tokens: float, n_train_tokens: float) -> float:
    """L for a text of `n_train_tokens` tokens. Only ratios of its values mean something."""
    useful = useful_tokens(n_tokens, n_train_tokens, useful_repeats(n_parameters, n_train_tokens))
    of_size = _A * math.pow(n_parameters / _MILLION, -_EXPONENT)
    return _E + of_size + _B * math.pow(useful / _MILLION, -_EXPONENT)


def useful_repeats(n_parameters: float, n_train_tokens: float) -> float:
    """R, the number of further passes that are worth about as much as new text."""
    return min(_MAX_R, _C * math.pow(n_train_tokens / n_parameters, _C_EXPONENT))


def useful_tokens(n_tokens: float, n_different: float, r: float) -> float:
    """D': the number of new tokens that teach as much as `n_tokens` tokens with repetitions."""
    n_repeats = n_tokens / n_different - 1
    if n_repeats <= 0:
        return n_tokens
    return n_different * (1 + r * (1 - math.exp(-n_repeats / r)))

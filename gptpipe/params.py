"""params.yaml as one frozen object. Each section is declared next to the code of its stage.

No stage depends on this file, because DVC compares the values themselves.
"""

from pathlib import Path

from gptpipe.base.params import PARAMS, read_params
from gptpipe.collect.params import CollectParams
from gptpipe.evaluate.params import EvaluateParams
from gptpipe.split.params import SplitParams
from gptpipe.tokenize.params import TokenizeParams
from gptpipe.train.params import RunParams


class Params(RunParams):
    """All sections of params.yaml."""

    collect: CollectParams
    tokenize: TokenizeParams
    split: SplitParams
    evaluate: EvaluateParams


def load_params(path: Path = PARAMS) -> Params:
    """Read and check params.yaml. Raises ConfigError that lists all errors, one per line."""
    return read_params(path, Params)

"""Sections of params.yaml as they ship, every filter off, but for what a test changes."""

from pathlib import Path
from typing import Any

from gptpipe.collect.params import FilterParams
from gptpipe.formats.sides import SIDES, Side, sides_of
from gptpipe.params import load_params
from gptpipe.split.params import SplitParams
from gptpipe.tokenize.params import TokenizeParams

SHIPPED = load_params(Path(__file__).parents[1] / "params.yaml")


def filters(**changed: Any) -> FilterParams:
    return FilterParams(**{**dict(SHIPPED.collect.filters), **changed})


def split_params(**changed: Any) -> SplitParams:
    return SplitParams.model_validate({**dict(SHIPPED.split), **changed})


def tokenize_params(**changed: Any) -> TokenizeParams:
    return TokenizeParams(**{**dict(SHIPPED.tokenize), **changed})


def side_of(document_id: str, params: SplitParams, seed: int) -> Side:
    return SIDES[int(sides_of([document_id], params.fractions, seed)[0])]

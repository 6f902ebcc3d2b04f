"""Sections of params.yaml as they ship, every filter off, but for what a test changes."""

from pathlib import Path
from typing import Any

from gptpipe.config import FilterParams, SplitParams, TokenizeParams, load_params
from gptpipe.tokens.splits import SIDES, Side, sides_of

SHIPPED = load_params(Path(__file__).parents[1] / "params.yaml")


def filters(**changed: Any) -> FilterParams:
    return FilterParams(**{**dict(SHIPPED.collect.filters), **changed})


def split_params(**changed: Any) -> SplitParams:
    return SplitParams.model_validate({**dict(SHIPPED.split), **changed})


def tokenize_params(**changed: Any) -> TokenizeParams:
    return TokenizeParams(**{**dict(SHIPPED.tokenize), **changed})


def side_of(document_id: str, params: SplitParams, seed: int) -> Side:
    return SIDES[int(sides_of([document_id], params, seed)[0])]

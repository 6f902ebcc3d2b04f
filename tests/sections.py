"""Sections of params.yaml as they ship, every filter off, but for what a test changes."""

from pathlib import Path
from typing import Any

from gptpipe.config import FilterParams, SplitParams, load_params

SHIPPED = load_params(Path(__file__).parents[1] / "params.yaml")


def filters(**changed: Any) -> FilterParams:
    return FilterParams(**{**dict(SHIPPED.collect.filters), **changed})


def split_params(**changed: Any) -> SplitParams:
    return SplitParams.model_validate({**dict(SHIPPED.split), **changed})

"""Section `split` of params.yaml."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from gptpipe.base.params import Ratio, Section, Share
from gptpipe.collect.params import Source
from gptpipe.formats.sides import Fractions


class SplitParams(Section):
    """What fraction of the documents is held out, and how overlap with train is measured."""

    val_fraction: Share
    test_fraction: Share
    ngram: Annotated[int, Field(ge=2)]  # words in a row; see split/overlap.py
    benchmarks: tuple[Source, ...]
    max_contamination: Ratio | None

    @field_validator("test_fraction")
    @classmethod
    def _leaves_something_to_train_on(cls, test_fraction: float, info: ValidationInfo) -> float:
        if info.data.get("val_fraction", 0) + test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must be below 1")
        return test_fraction

    @property
    def fractions(self) -> Fractions:
        return Fractions(self.val_fraction, self.test_fraction)

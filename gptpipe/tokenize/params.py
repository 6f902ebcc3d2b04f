"""Section `tokenize` of params.yaml."""

from typing import Annotated

from pydantic import Field

from gptpipe.base.params import Positive, Section


class TokenizeParams(Section):
    """How documents become tokens."""

    encoding: Annotated[str, Field(min_length=1)]
    vocab_size: Annotated[int, Field(ge=257, lt=2**31)]  # at least 256 bytes and the end-of-text token
    training_bytes: Positive  # about this much text trains an encoding; the documents are chosen by id

    @property
    def is_trained(self) -> bool:
        return self.encoding == "trained"

"""Section `model` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator

from gptpipe.base.params import Positive, PositiveFloat, Section, Share


class ModelParams(Section):
    """The network. The size of its vocabulary comes from the tokenizer."""

    architecture: Literal["gpt2", "llama", "qwen3"]
    context_length: Annotated[int, Field(ge=2)]
    n_layer: Positive
    n_head: Positive
    n_kv_head: Positive
    n_embd: Positive
    head_dim: Positive | None
    n_inner: Positive
    dropout: Share
    rope_theta: Annotated[FiniteFloat, Field(ge=1)]  # smaller ones give NaN
    norm_eps: PositiveFloat
    tie_embeddings: bool

    @property
    def resolved_head_dim(self) -> int:
        """`head_dim`, or n_embd / n_head if it is null."""
        return self.head_dim or self.n_embd // self.n_head

    @field_validator("n_kv_head")
    @classmethod
    def _divides_query_heads(cls, n_kv_head: int, info: ValidationInfo) -> int:
        n_head = info.data.get("n_head", n_kv_head)
        if n_head % n_kv_head:
            raise ValueError(f"must divide n_head {n_head}")
        if info.data.get("architecture") == "gpt2" and n_kv_head != n_head:
            raise ValueError(f"gpt2 has one key and value head per query head: set it to {n_head}")
        return n_kv_head

    @field_validator("head_dim")
    @classmethod
    def _fits_the_network(cls, head_dim: int | None, info: ValidationInfo) -> int | None:
        n_head, n_embd = info.data.get("n_head"), info.data.get("n_embd")
        if n_head is None or n_embd is None:
            return head_dim
        if head_dim is None and n_embd % n_head:
            raise ValueError(f"n_head {n_head} must divide n_embd {n_embd} if head_dim is null")
        if info.data.get("architecture") == "gpt2":
            if head_dim not in (None, n_embd / n_head):
                raise ValueError("the head_dim of gpt2 is always n_embd / n_head: set it to null")
        elif (head_dim or n_embd // n_head) % 2:
            raise ValueError(f"rotary positions need an even head_dim, it is {head_dim or n_embd // n_head}")
        return head_dim

    @field_validator("tie_embeddings")
    @classmethod
    def _gpt2_ties_embeddings(cls, tie_embeddings: bool, info: ValidationInfo) -> bool:
        if info.data.get("architecture") == "gpt2" and not tie_embeddings:
            raise ValueError("gpt2 uses one matrix for input and output: set it to true")
        return tie_embeddings

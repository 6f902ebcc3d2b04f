"""Section `train` of params.yaml, and all that decides a training."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator

from gptpipe.base.params import Count, Positive, PositiveFloat, Ratio, Section, Share
from gptpipe.model.params import ModelParams


class TrainParams(Section):
    """How the network is trained."""

    init_from: str | None
    continue_from: str | None
    launcher: str
    parallel: Literal["ddp", "fsdp"]
    optimizer: Literal["adamw", "muon"]
    lr: PositiveFloat
    embedding_lr_scale: PositiveFloat
    head_lr_scale: PositiveFloat
    betas: tuple[Share, Share]
    weight_decay: Annotated[FiniteFloat, Field(ge=0)]
    grad_clip: PositiveFloat | None
    z_loss: Annotated[FiniteFloat, Field(ge=0)]
    on_spike: Literal["stop", "rollback"]
    spike_sigmas: PositiveFloat | None
    schedule: Literal["cosine", "wsd", "linear", "constant"]
    warmup_steps: Count
    decay_fraction: Annotated[FiniteFloat, Field(gt=0, le=1)]
    final_lr_fraction: Ratio
    batch_size: Positive
    micro_batch_size: Positive | None
    stride: Positive
    document_masking: bool
    epochs: PositiveFloat | None
    max_steps: Positive | None
    eval_every: Positive
    save_every: Positive
    keep_state: bool
    patience: Positive | None
    activation_checkpointing: bool
    sample_prompts: tuple[str, ...]
    sample_tokens: Positive
    device: str
    precision: Literal["auto", "float32", "bfloat16"]
    compile: Literal["auto", True, False]

    @field_validator("micro_batch_size")
    @classmethod
    def _divides_the_batch(cls, micro_batch_size: int | None, info: ValidationInfo) -> int | None:
        batch_size = info.data.get("batch_size")
        if batch_size and micro_batch_size and batch_size % micro_batch_size:
            raise ValueError(f"must divide batch_size {batch_size}")
        return micro_batch_size

    @field_validator("stride")
    @classmethod
    def _leaves_no_gap(cls, stride: int, info: ValidationInfo) -> int:
        model = (info.context or {}).get("model")
        context_length = model.get("context_length") if isinstance(model, dict) else None
        if isinstance(context_length, int) and stride > context_length:
            raise ValueError(
                f"above model.context_length {context_length}: "
                "tokens between two windows would never be trained on"
            )
        return stride

    @field_validator("max_steps")
    @classmethod
    def _ends_after_warmup(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if max_steps is None and info.data.get("epochs", 0) is None:
            raise ValueError("one of epochs and max_steps must be set")
        if max_steps is not None and info.data.get("warmup_steps", 0) >= max_steps:
            raise ValueError(f"must be above warmup_steps {info.data['warmup_steps']}")
        return max_steps

    def n_steps(self, n_windows: int) -> int:
        """Optimizer steps of the whole training: the smaller of `max_steps` and `epochs` over all windows."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None:
            limits.append(max(1, math.ceil(self.epochs * n_windows / self.batch_size)))
        return min(limits)


class RunParams(Section):
    """What decides a training."""

    seed: Count
    model: ModelParams
    train: TrainParams

    def starting_from(self, name: str, shape: ModelParams) -> Self:
        """The same with the name and the shape of the model that `train.init_from` has led to."""
        train = self.train.model_copy(update={"init_from": name})
        return self.model_copy(update={"train": train, "model": shape})

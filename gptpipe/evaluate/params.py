"""Section `evaluate` of params.yaml."""

from typing import Annotated

from pydantic import Field, FiniteFloat

from gptpipe.base.params import Count, Positive, Section


class EvaluateParams(Section):
    """What to sample from the trained model, and which tasks to run."""

    prompts: tuple[str, ...]
    max_new_tokens: Positive
    temperature: Annotated[FiniteFloat, Field(ge=0)]
    top_k: Positive | None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)]
    continuation_documents: Count
    continuation_tokens: Positive
    check_transformers: bool
    tasks: tuple[Annotated[str, Field(min_length=1)], ...]
    task_folder: Annotated[str, Field(min_length=1)]

"""The registered model in the form that MLflow serves: a file of code and a model folder, without pickle."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ParamSchema

from gptpipe.base.manifest import verify
from gptpipe.model.generate import Sampling
from gptpipe.score.continuations import announce_cut, load_generator
from gptpipe.score.text_batch import continue_text, continue_texts
from gptpipe.shell.errors import ConfigError

_COLUMN = "prompt"
_OPTIONS = {"max_new_tokens", "temperature", "top_k", "top_p", "seed"}
_enforce_params = getattr(
    mlflow.pyfunc._enforce_params_schema, "original", mlflow.pyfunc._enforce_params_schema
)


class Generator(PythonModel):
    """Continues prompts. Each continuation stops at the end of a document.

    Prompts are a text, a list of texts, a dict with the key `prompt`, or a table with the column `prompt`. The
    model has no input schema, because none of MLflow's describes all of these.
    """

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["model"])
        verify(folder)
        self.model, self.tokenizer = load_generator(folder)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,  # or one of the others; MLflow would check any other type hint by itself
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """The prompts with their continuations, in a column `text`.

        MLflow's server has checked the types of `params`. It answers MlflowException with status 400.
        """
        max_new_tokens, sampling = _options(params)
        prompts = _prompts(model_input)
        for number, prompt in enumerate(prompts, start=1):
            announce_cut(self.model, self.tokenizer, prompt, f"prompt {number}")
        continuations = continue_texts(self.model, self.tokenizer, prompts, max_new_tokens, sampling)
        texts = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
        return pd.DataFrame({"text": texts})

    def predict_stream(
        self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """The same text for a single prompt, in pieces: first the prompt, then its continuation."""
        max_new_tokens, sampling = _options(params)
        prompts = _prompts(model_input)
        if len(prompts) != 1:
            raise MlflowException.invalid_parameter_value(f"a stream has one prompt, not {len(prompts)}")
        announce_cut(self.model, self.tokenizer, prompts[0], "the prompt")
        yield prompts[0]
        yield from continue_text(self.model, self.tokenizer, prompts[0], max_new_tokens, sampling)


def _options(params: dict[str, Any] | None) -> tuple[int, Sampling]:
    """The number of new tokens, and how to sample them. Raises MlflowException."""
    options = dict(params or {})
    for name, value in options.items():
        if value is None:
            raise MlflowException.invalid_parameter_value(f"{name} is null; give a value, or leave it out")
    max_new_tokens = int(options.pop("max_new_tokens"))
    if max_new_tokens < 1:
        raise MlflowException.invalid_parameter_value("max_new_tokens must be 1 or more")
    try:
        return max_new_tokens, Sampling(**{**options, "top_k": options.get("top_k") or None})
    except ConfigError as error:
        raise MlflowException.invalid_parameter_value(str(error)) from error


def _prompts(model_input: Any) -> list[str]:
    """The prompts of any form of input. Raises MlflowException if there is something else."""
    prompts = list(_leaves(model_input))
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            is_null = prompt is None or prompt != prompt  # a table has NaN for null
            found = "null" if is_null else f"of type {type(prompt).__name__}"
            raise MlflowException.invalid_parameter_value(f"prompt {number} is {found}; give a text")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise MlflowException.invalid_parameter_value(
                f"prompt {number} is not valid Unicode; it has a surrogate"
            )
    return prompts


def _leaves(value: Any) -> Iterator[Any]:
    """What is in a text, a list, an array, a column, a dict or a table; each may contain the others."""
    if isinstance(value, pd.DataFrame):
        columns: list[Any] = list(value.columns)
        if _COLUMN not in columns and columns != [0]:  # MLflow names the column of a list 0
            raise MlflowException.invalid_parameter_value(
                f"the table has no column `{_COLUMN}`, only {columns}"
            )
        value = value[_COLUMN if _COLUMN in columns else 0]
    if isinstance(value, dict):
        if set(value) != {_COLUMN}:
            keys = ", ".join(sorted(map(str, value)))
            raise MlflowException.invalid_parameter_value(
                f"a dict has the one key `{_COLUMN}`, not {keys or 'none'}"
            )
        value = value[_COLUMN]
    if isinstance(value, np.ndarray | pd.Series):
        value = value.tolist()  # of an array without dimensions, its only element
    if isinstance(value, list | tuple | dict):
        for item in value if isinstance(value, list | tuple) else [value]:
            yield from _leaves(item)
    else:
        yield value


def _refuse_unknown_params(params: Any, schema: ParamSchema | None) -> Any:
    """MLflow's check of `params`, which drops unknown ones with a line in the server's log."""
    if isinstance(params, dict) and schema and {param.name for param in schema.params} == _OPTIONS:
        unknown = ", ".join(sorted(map(str, set(params) - _OPTIONS)))
        if unknown:
            known = ", ".join(sorted(_OPTIONS))
            raise MlflowException.invalid_parameter_value(f"unknown parameter {unknown}; there are {known}")
    return _enforce_params(params, schema)


# This file is run for each loaded model, so the original function is kept.
_refuse_unknown_params.original = _enforce_params  # type: ignore[attr-defined]
mlflow.pyfunc._enforce_params_schema = _refuse_unknown_params  # type: ignore[attr-defined]  # a lazy module
set_model(Generator())

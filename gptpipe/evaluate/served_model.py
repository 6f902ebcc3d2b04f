"""The registered model in the form that MLflow serves: a file of code and a model folder, without pickle."""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from gptpipe.base.manifest import verify
from gptpipe.model.generate import Sampling
from gptpipe.score.continuations import announce_cut, continue_text, load_generator
from gptpipe.shell.errors import ConfigError


class Generator(PythonModel):
    """Continues each prompt of the column `prompt`."""

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["model"])
        verify(folder)
        self.model, self.tokenizer = load_generator(folder)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """The prompts with their continuations, in a column `text`. Each stops at the end of a document.

        MLflow's server has checked the types of `params` and dropped unknown ones. It answers MlflowException
        with status 400.
        """
        options = dict(params or {})
        max_new_tokens = int(options.pop("max_new_tokens"))
        try:
            sampling = Sampling(**{**options, "top_k": options.get("top_k") or None})
        except ConfigError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        if max_new_tokens < 1:
            raise MlflowException.invalid_parameter_value("max_new_tokens must be 1 or more")
        for i, prompt in enumerate(model_input["prompt"]):
            announce_cut(self.model, self.tokenizer, prompt, f"prompt {i}")
        texts = [
            prompt + "".join(continue_text(self.model, self.tokenizer, prompt, max_new_tokens, sampling))
            for prompt in model_input["prompt"]
        ]
        return pd.DataFrame({"text": texts})


set_model(Generator())

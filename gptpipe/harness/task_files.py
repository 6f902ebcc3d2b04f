"""Tasks of the user: YAML files in `evaluate.task_folder`, in the format of lm-evaluation-harness.

The harness itself would run code from such a file: functions that it names with `!function`, Python inside its
Jinja templates, and the code of a metric on the Hugging Face hub. So it does not see the file. The file is read
as plain YAML, only the keys and metrics below are allowed, data is read from local files in the folder, and
templates are rendered in Jinja's sandbox.
"""

import ast
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, ValidationInfo, field_validator

from gptpipe.base.params import Count, Positive, Section, read_params
from gptpipe.shell.errors import ConfigError, InputError, first_line

Document = dict[str, Any]
_SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def _check_plain(text: str) -> str:
    """Raise ValueError if the harness would take the text as a template."""
    if any(mark in text for mark in ("{{", "{%", "{#")):
        raise ValueError("must be plain text, without `{{`, `{%` and `{#`")
    return text


class Metric(Section):
    """One of `metric_list`."""

    metric: Literal[
        "acc", "acc_norm", "exact_match", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"
    ]
    aggregation: Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte"] | None = None
    higher_is_better: bool | None = None


class Generation(Section):
    """How an answer is generated."""

    until: Annotated[tuple[str, ...], Field(min_length=1)]
    max_gen_toks: Positive = 64
    do_sample: Literal[False] = False


class DatasetFiles(Section):
    """Names of files in the folder of the task, by split."""

    data_files: Annotated[dict[str, str], Field(min_length=1)]


class TaskFile(Section):
    """The keys of a task's YAML file. What they mean is described by lm-evaluation-harness."""

    task: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    dataset_path: Literal["json", "csv", "text"]
    dataset_kwargs: DatasetFiles
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    output_type: Literal["loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until"]
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: str | tuple[str, ...] | None = None
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    num_fewshot: Count = 0
    generation_kwargs: Generation | None = None
    metric_list: Annotated[tuple[Metric, ...], Field(min_length=1)]
    metadata: dict[Literal["version"], int | float | str] | None = None

    @field_validator("description", "target_delimiter", "fewshot_delimiter")
    @classmethod
    def _is_plain(cls, text: str) -> str:
        return _check_plain(text)

    @field_validator("metric_list")
    @classmethod
    def _has_documents(cls, metrics: tuple[Metric, ...], info: ValidationInfo) -> tuple[Metric, ...]:
        if info.data.get("test_split") is None and info.data.get("validation_split") is None:
            raise ValueError("the task needs a test_split or a validation_split")
        return metrics


def read_task_files(folder: Path) -> dict[str, tuple[Path, TaskFile]]:
    """Path and content of each `*.yaml` file of the folder, by the name of its task. Raises ConfigError."""
    tasks: dict[str, tuple[Path, TaskFile]] = {}
    for path in sorted(folder.glob("*.yaml")):
        content = read_params(path, TaskFile)
        if content.task in tasks:
            raise ConfigError(
                f"{path}: {tasks[content.task][0]} has the same `task: {content.task}`; rename one"
            )
        tasks[content.task] = (path, content)
    return tasks


def harness_config(path: Path, task: TaskFile) -> dict[str, Any]:
    """The configuration of a task as the harness takes it, with functions in place of templates.

    Raises ConfigError if a data file is not in the folder.
    """
    config = task.model_dump(exclude_none=True)
    config["metric_list"] = list(config["metric_list"])
    files = {split: _data_file(path, name) for split, name in task.dataset_kwargs.data_files.items()}
    for key in _SPLITS:
        if config.get(key) is not None and config[key] not in files:
            raise ConfigError(f"{path}: {key}: `{config[key]}` is not in data_files, only {', '.join(files)}")
    config["dataset_kwargs"] = {"data_files": files}
    if task.generation_kwargs:
        config["generation_kwargs"]["until"] = list(task.generation_kwargs.until)
    config["doc_to_text"] = partial(_value, path, "doc_to_text", task.doc_to_text)
    if isinstance(task.doc_to_target, str):
        has_choices = task.doc_to_choice is not None
        config["doc_to_target"] = partial(_target, path, task.doc_to_target, has_choices)
    if isinstance(task.doc_to_choice, str):
        config["doc_to_choice"] = partial(_choices, path, task.doc_to_choice)
    elif task.doc_to_choice is not None:
        config["doc_to_choice"] = list(task.doc_to_choice)
    return config


def _data_file(path: Path, name: str) -> str:
    file = (path.parent / name).resolve()
    if not file.is_relative_to(path.parent.resolve()):
        raise ConfigError(f"{path}: data_files: {name} is not in the folder {path.parent}; copy it there")
    if not file.is_file():
        raise ConfigError(f"{path}: data_files: there is no file {path.parent / name}")
    return str(file)


def _value(path: Path, key: str, template: str, document: Document) -> Any:
    """The value of a column, or the text of a template. Raises InputError if the template fails."""
    if template in document:
        return document[template]
    try:
        return _SANDBOX.from_string(template).render(**document)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"{path}: {key}: {first_line(error)}; fix the template, or the data file") from error


def _target(path: Path, template: str, has_choices: bool, document: Document) -> Any:
    """The right answer, or the index of the right choice."""
    value = _value(path, "doc_to_target", template, document)
    return int(value) if has_choices and isinstance(value, str) and value.isdigit() else value


def _choices(path: Path, template: str, document: Document) -> list[str]:
    """The choices, from a column or from the text of a template, which is then a list in Python's notation."""
    value = _value(path, "doc_to_choice", template, document)
    try:
        choices = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{path}: doc_to_choice: {value!r:.80} is not a list of texts; fix the template"
        ) from error
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(f"{path}: doc_to_choice: {value!r:.80} is not a list of texts; fix the template")
    return choices

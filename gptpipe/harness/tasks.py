"""The tasks that `evaluate.tasks` names: loaded by lm-evaluation-harness, and their documents as text.

Stage split compares the documents with the training text, stage evaluate runs the tasks.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptpipe.harness.task_files import TaskFile, harness_config, read_task_files
from gptpipe.shell.environment import optional_module
from gptpipe.shell.errors import ConfigError, GptpipeError, InputError, ResourceError, first_line

_MAX_NAMES = 3  # similar names in a message


def load_tasks(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """`tasks` by name, and `groups`, as the harness's TaskManager gives them; downloads data sets if needed.

    A name of the user's folder comes before one of the harness. Raises ConfigError for a missing package, an
    unknown name and a wrong file, InputError for wrong data, ResourceError if there is no network.
    """
    optional_module("lm_eval", "harness")
    from lm_eval.tasks import TaskManager  # late: it takes seconds

    optional_module("datasets", "harness").disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = read_task_files(folder)
    # To index the tasks of the harness takes about 15 seconds.
    manager = TaskManager(include_defaults=any(name not in own for name in names))
    _check_names(names, [*own, *manager.all_tasks])
    with harness_errors(", ".join(names)):
        loaded: dict[str, Any] = manager.load(
            [_own_task(*own[name]) if name in own else name for name in names]
        )
    return loaded


def _own_task(path: Path, content: TaskFile) -> Any:
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=harness_config(path, content))


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError that lists each unknown name with the most similar known ones."""
    lines = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=_MAX_NAMES, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            lines.append(
                f"evaluate.tasks: neither the harness nor evaluate.task_folder has a task {name}{hint}"
            )
    if lines:
        raise ConfigError(*lines)


@contextmanager
def harness_errors(name: str) -> Iterator[None]:
    """Turn the errors of a task into ours. The harness and its tasks raise exceptions of any class."""
    try:
        yield
    except (GptpipeError, MemoryError):
        raise
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise ResourceError(
                f"evaluate.tasks: {name}: {reason}; rerun when the hub can be reached, or remove the task"
            ) from error
        if isinstance(error, ImportError):
            raise ConfigError(f"evaluate.tasks: {name}: {reason}; install it, or remove the task") from error
        raise InputError(
            f"evaluate.tasks: {name}: {type(error).__name__}: {reason}; fix the task and its data, or remove it"
        ) from error


def texts_of_tasks(names: Sequence[str], folder: Path) -> dict[str, Iterator[str]]:
    """The text of each document of the tasks, by the name of the task. Raises as `load_tasks` does."""
    tasks = load_tasks(names, folder)["tasks"] if names else {}
    return {name: task_items(task) for name, task in tasks.items()}


def task_items(task: Any) -> Iterator[str]:
    """The text of each document of a task: what it asks, without examples, and the right answer."""
    for document in task.eval_docs:
        target = task.doc_to_target(document)
        targets = target if isinstance(target, list) else [target]
        parts = [task.doc_to_text(document), *targets]
        yield " ".join(_as_text(part, task, document) for part in parts)


def _as_text(part: Any, task: Any, document: Any) -> str:
    """A text; of the index of a choice, the text of the choice."""
    return str(task.doc_to_choice(document)[part] if isinstance(part, int) and _has_choices(task) else part)


def _has_choices(task: Any) -> bool:
    return getattr(task.config, "doc_to_choice", None) is not None

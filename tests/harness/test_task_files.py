"""Tasks of the user: what a file may contain. Nothing in it is executed."""

import json
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import CHOICE, write_task

from gptpipe.harness.task_files import harness_config, read_task_files
from gptpipe.shell.errors import ConfigError, InputError


def config_of(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    write_task(folder, task, [])
    return harness_config(*read_task_files(folder)[task["task"]])


def test_templates_and_columns_become_functions(tmp_path: Path) -> None:
    task = CHOICE | {
        "doc_to_text": "Q: {{q|upper}}\n",
        "doc_to_choice": "{{[a, b]}}",
        "doc_to_target": "{{right}}",
    }
    config = config_of(tmp_path, task)
    document = {"q": "é?", "a": "it's", "b": "no", "right": 1}
    assert config["doc_to_text"](document) == "Q: É?\n"
    assert config["doc_to_choice"](document) == ["it's", "no"]
    assert config["doc_to_target"](document) == 1
    assert config_of(tmp_path, CHOICE)["doc_to_choice"]({"choices": ["x", "y"]}) == ["x", "y"]
    assert config["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "items.jsonl")}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("process_docs: !function utils.process", "task.yaml, line 2: could not determine a constructor"),
        ("x: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
        ("process_docs: utils.process", "process_docs: unknown key"),
        ("include: other.yaml", "include: unknown key"),
        ("class: os.system", "class: unknown key"),
        ("unsafe_code: true", "unsafe_code: unknown key"),
        ("custom_dataset: os.system", "custom_dataset: unknown key"),
        ("use_prompt: promptsource:x", "use_prompt: unknown key"),
        ("dataset_path: pandas", "dataset_path: Input should be 'json', 'csv' or 'text'"),
        ("dataset_path: owner/name", "dataset_path: Input should be 'json', 'csv' or 'text'"),
        ("metric_list: [{metric: owner/metric}]", "metric_list.0.metric: Input should be 'acc'"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "metric_list.0.hf_evaluate: unknown key"),
        ('description: "{{ self }}"', "description: must be plain text"),
        ('fewshot_delimiter: "{% x %}"', "fewshot_delimiter: must be plain text"),
        ("test_split: null", "the task needs a test_split or a validation_split"),
    ],
)
def test_what_could_execute_code_is_refused(tmp_path: Path, line: str, message: str) -> None:
    key = line.split(":")[0]
    rest = [f"{name}: {json.dumps(value)}" for name, value in CHOICE.items() if name != key]
    (tmp_path / "task.yaml").write_text("\n".join([rest[0], line, *rest[1:]]))
    (tmp_path / "utils.py").write_text("open('canary', 'w')\n")
    with pytest.raises(ConfigError) as caught:
        read_task_files(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{{ question.format.__globals__ }}",
        "{{ '{0.__class__}'.format(question) }}",
        "{{ choices.append('x') }}",
        "{{ missing }}",
        "{% for x in %}",
        "{{ 1 / 0 }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_templates_are_rendered_in_a_sandbox(tmp_path: Path, template: str) -> None:
    render = config_of(tmp_path, CHOICE | {"doc_to_text": template})["doc_to_text"]
    with pytest.raises(InputError, match=r"choice.yaml: doc_to_text: .*; fix the template"):
        render({"question": "q", "choices": ["a"]})


def test_choices_must_be_texts(tmp_path: Path) -> None:
    for template in ("{{ 1 }}", "{{ [1, 2] }}", "{{ __import__ }}", "a", "['']", "(" * 500):
        choices = config_of(tmp_path, CHOICE | {"doc_to_choice": template})["doc_to_choice"]
        with pytest.raises(InputError, match="doc_to_choice"):
            choices({"question": "q"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../items.jsonl", "is not in the folder"),
        ("/etc/passwd", "is not in the folder"),
        ("none.jsonl", "there is no file"),
        ("https://example.com/items.jsonl", "there is no file"),
    ],
)
def test_data_files_are_in_the_folder(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "items.jsonl").touch()
    task = CHOICE | {"dataset_kwargs": {"data_files": {"test": name}}}
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path / "tasks", task)


def test_a_split_without_a_file_and_two_tasks_of_one_name_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="test_split: `other` is not in data_files, only test"):
        config_of(tmp_path, CHOICE | {"test_split": "other"})
    (tmp_path / "second.yaml").write_text((tmp_path / "choice.yaml").read_text())
    with pytest.raises(
        ConfigError, match=r"second.yaml: .*choice.yaml has the same `task: choice`; rename one"
    ):
        read_task_files(tmp_path)

"""Tasks of the harness and of the user: names, errors, and their documents as text."""

import sys
from pathlib import Path

import pytest
from harness_tasks import CHOICE, GENERATE, ROLLING, write_task

from gptpipe.harness.tasks import harness_errors, load_tasks, task_items
from gptpipe.shell.errors import ConfigError, GptpipeError, InputError, ResourceError


def test_a_missing_package_is_an_error_that_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"needs `lm_eval`: pip install -e '\.\[harness\]'"):
        load_tasks(["blimp"], tmp_path)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub"),
            ResourceError,
            "rerun when the hub can be reached",
        ),
        (ModuleNotFoundError("No module named 'x'"), ConfigError, "No module named 'x'; install it"),
        (KeyError("column"), InputError, "KeyError: 'column'; fix the task and its data"),
        (FileNotFoundError("a/b"), InputError, "fix the task and its data"),
        (InputError("ours"), InputError, "^ours$"),
    ],
)
def test_errors_of_a_task_are_those_of_its_data_the_network_or_a_package(
    error: Exception, kind: type[GptpipeError], message: str
) -> None:
    with pytest.raises(kind, match=message), harness_errors("name"):
        raise error


class TestWithTheHarness:
    @pytest.fixture(autouse=True)
    def _needs_the_harness(self) -> None:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[harness]'")

    def test_the_items_of_a_task_are_what_it_asks_and_the_right_answer(self, tmp_path: Path) -> None:
        document = {"question": "Is it?", "choices": ["no", "yes"], "answer": 1}
        write_task(tmp_path / "a", CHOICE, [document, document | {"answer": 0}])
        write_task(tmp_path / "b", ROLLING, [{"text": "a whole text"}])
        write_task(tmp_path / "c", GENERATE, [{"prompt": "say", "answer": "yes"}])
        for folder, name, items in [
            ("a", "choice", ["Is it? yes", "Is it? no"]),
            ("b", "rolling", [" a whole text"]),
            ("c", "generate", ["say yes"]),
        ]:
            task = load_tasks([name], tmp_path / folder)["tasks"][name]
            assert list(task_items(task)) == items

    @pytest.mark.slow  # the harness indexes 14,000 files
    def test_an_unknown_task_is_an_error_with_similar_names(self, tmp_path: Path) -> None:
        write_task(tmp_path, CHOICE, [])
        with pytest.raises(ConfigError) as caught:
            load_tasks(["choise", "blimpp", "qqqqqqqq"], tmp_path)
        first, second, third = str(caught.value).splitlines()
        assert "has a task choise; did you mean choice" in first
        assert "blimp" in second.partition("did you mean")[2]
        assert third.endswith("has a task qqqqqqqq")

    def test_wrong_data_is_an_error_that_names_the_file(self, tmp_path: Path) -> None:
        write_task(tmp_path, CHOICE, [{"question": "Is it?"}])
        with pytest.raises(InputError, match="doc_to_choice: 'choices' is not a list of texts"):
            load_tasks(["choice"], tmp_path)

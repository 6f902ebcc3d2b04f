"""Which models a training can start from, and how they are found."""

import shutil
from pathlib import Path

import pytest
import tiny
from mlflow.exceptions import MlflowException

from gptpipe.base.files import write_bytes
from gptpipe.record import starting_model as module
from gptpipe.record.starting_model import names_a_model, starting_model
from gptpipe.record.store import connect
from gptpipe.shell.errors import ConfigError, GptpipeError, InputError, IntegrityError

OUTPUT = Path("models/gpt")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a model to start from, and the same model as the pipeline's own output."""
    monkeypatch.chdir(tmp_path)
    tiny.make_model(tmp_path / "data/start/base")
    shutil.copytree("data/start/base", OUTPUT)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "is_model"),
    [("trained", False), ("gpt2", False), ("data/start/base", True), ("models:/gpt/1", True)],
)
def test_a_value_with_a_slash_names_a_model(value: str, is_model: bool) -> None:
    assert names_a_model(value) is is_model


def test_a_folder_that_dvc_watches_is_used_in_place(project: Path) -> None:
    with starting_model("train.init_from", "data/start/base", OUTPUT) as start:
        assert start is not None
        assert (start.name, start.folder) == ("data/start/base", Path("data/start/base"))
    with starting_model("train.init_from", None, OUTPUT) as start:
        assert start is None


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ("models/gpt", ConfigError, "is the output of stage train: DVC removes it before the stage starts"),
        ("./models/../models/gpt", ConfigError, "is the output of stage train"),
        ("elsewhere/base", ConfigError, "is not in data/start/, where DVC notices changes; copy"),
        ("data/start/../base", ConfigError, "is not in data/start/"),
        ("data/start", ConfigError, "is not in data/start/"),
        ("data/start/none", InputError, "there is no folder data/start/none"),
        ("models:gpt", ConfigError, "is neither models:/NAME@ALIAS nor models:/NAME/VERSION"),
        ("models:/gpt/latest", ConfigError, "is neither models:/NAME@ALIAS nor models:/NAME/VERSION"),
        ("models:/gpt@champion", ConfigError, "`mlflow ui` shows the registered models"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_what_to_do(
    project: Path, value: str, kind: type[GptpipeError], reason: str
) -> None:
    with pytest.raises(kind, match=reason) as caught, starting_model("train.init_from", value, OUTPUT):
        pass
    assert str(caught.value).startswith("train.init_from: ")


def test_a_damaged_folder_is_refused(project: Path) -> None:
    write_bytes(project / "data/start/base/model.safetensors", b"x")
    with pytest.raises(IntegrityError), starting_model("train.init_from", "data/start/base", OUTPUT):
        pass


@pytest.mark.parametrize("value", ["models:/gpt@champion", "models:/gpt/1"])
def test_a_registered_model_is_found_and_named_by_its_version(project: Path, value: str) -> None:
    client = connect()
    experiment = client.get_experiment_by_name("gptpipe")
    assert experiment is not None
    run_id = client.create_run(experiment.experiment_id).info.run_id
    stored = tiny.make_model(project / "registered/artifacts/gpt")
    client.create_registered_model("gpt")
    client.create_model_version("gpt", (project / "registered").as_uri(), run_id)
    client.set_registered_model_alias("gpt", "champion", "1")
    with starting_model("train.init_from", value, OUTPUT) as start:
        assert start is not None
        assert (start.name, start.folder) == ("models:/gpt/1", stored)
    (stored / "model.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError), starting_model("train.init_from", value, OUTPUT):
        pass


def test_a_registered_model_whose_files_cannot_be_read_is_an_integrity_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    client.create_registered_model("gpt")
    client.create_model_version("gpt", (project / "none").as_uri())

    def fail(*_: object) -> Path:
        raise MlflowException("gone")

    monkeypatch.setattr(module, "stored_folder", fail)
    with (
        pytest.raises(IntegrityError, match="models:/gpt/1: gone"),
        starting_model("x", "models:/gpt/1", OUTPUT),
    ):
        pass

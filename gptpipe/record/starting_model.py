"""The model that a parameter names to start from: a folder that DVC watches, or a version in the registry.

The registry's alias is resolved when the stage runs. `dvc repro` does not repeat a stage because an alias has
moved: a training that starts from the champion may make the next champion, and would otherwise start again
without end.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gptpipe.base.manifest import MANIFEST, verify
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, first_line

WATCHED = Path("data/start")  # a dependency of the stages in dvc.yaml
MODEL_FOLDER = "gpt"  # MLflow gives the stored model folder the name of the original
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class StartingModel:
    """A verified model folder. `name` identifies it: its path, or `models:/NAME/VERSION`."""

    name: str
    folder: Path


def names_a_model(value: str) -> bool:
    """Whether a value of `tokenize.encoding` names a model folder or a registered model, not an encoding."""
    return "/" in value


@contextmanager
def starting_model(parameter: str, value: str | None, output: Path) -> Iterator[StartingModel | None]:
    """The model that `parameter` names by `value`; None for None. The pipeline writes the folder `output`.

    Raises ConfigError for a name that cannot be used, InputError for a folder that does not exist,
    IntegrityError for a damaged one, and ResourceError if the store fails.
    """
    if value is None:
        yield None
    elif value.startswith("models:"):
        with tempfile.TemporaryDirectory() as folder:
            yield _registered_model(parameter, value, Path(folder))
    else:
        yield _watched_folder(parameter, value, output)


def model_folder(parameter: str, value: Path | str, temporary: Path) -> Path:
    """A verified model folder: `value` itself, or that of a registered model, maybe copied into `temporary`.

    Raises ConfigError for a name that cannot be used, InputError, IntegrityError, ResourceError.
    """
    if isinstance(value, str):
        return _registered_model(parameter, value, temporary).folder
    verify(value)
    return value


def _watched_folder(parameter: str, value: str, output: Path) -> StartingModel:
    folder, watched = Path(value).resolve(), WATCHED.resolve()
    if folder == output.resolve():
        raise ConfigError(
            f"{parameter}: {value} is the output of stage train: DVC removes it before the stage starts, "
            f"and a pipeline cannot depend on its own output; copy it into {WATCHED}/, "
            "or name a registered model, such as models:/gpt@champion"
        )
    if folder == watched or not folder.is_relative_to(watched):
        raise ConfigError(
            f"{parameter}: {value} is not in {WATCHED}/, where DVC notices changes; "
            "copy the model into that folder"
        )
    if not folder.is_dir():
        raise InputError(f"{parameter}: there is no folder {value}; copy the model there")
    if (folder / MANIFEST).exists():
        verify(folder)
    return StartingModel(value, Path(value))


def _registered_model(parameter: str, value: str, temporary: Path) -> StartingModel:
    match = _REGISTERED.fullmatch(value)
    if match is None:
        raise ConfigError(f"{parameter}: {value!r:.100} is neither models:/NAME@ALIAS nor models:/NAME/VERSION")
    from mlflow.exceptions import MlflowException  # late: data stages rarely need MLflow

    from gptpipe.record.store import RefusedError, connect, store_errors

    name = match["name"]
    try:
        with store_errors():
            client = connect()
            version = match["version"] or client.get_model_version_by_alias(name, match["alias"]).version
            location = client.get_model_version_download_uri(name, str(version))
    except RefusedError as error:
        reason = first_line(error).removeprefix("tracking store: ")
        raise ConfigError(f"{parameter}: {value}: {reason}; `mlflow ui` shows the registered models") from error
    try:
        folder = stored_folder(location, MODEL_FOLDER, temporary)
        verify(folder)
    except (MlflowException, OSError) as error:
        raise IntegrityError(
            f"{parameter}: {value}: {first_line(error)}; `gptpipe doctor` checks the store"
        ) from error
    return StartingModel(f"models:/{name}/{version}", folder)


def stored_folder(location: str, name: str, folder: Path) -> Path:
    """A part of a stored model at its artifact location: in place if it is here, else a copy in `folder`."""
    parts = urlsplit(location)
    if parts.scheme in ("", "file"):
        return Path(url2pathname(parts.path), "artifacts", name)
    import mlflow.artifacts

    return Path(mlflow.artifacts.download_artifacts(f"{location}/artifacts/{name}", dst_path=str(folder)))

"""No code from a data file, a checkpoint or a model is executed. Each payload would create a canary file."""

import io
import pickle
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from gptpipe.base.files import sha256_of, write_bytes
from gptpipe.base.manifest import FileEntry, read_manifest
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.evaluate.evaluate import evaluate_model
from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.hf_weights import initialise_from
from gptpipe.shell.errors import GptpipeError, InputError, IntegrityError
from gptpipe.train.checkpoint import Checkpoints


class Payload:
    """Creates a file when it is unpickled, by the REDUCE operation of pickle."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.canary,))


def legacy_tar(payload: Payload) -> bytes:
    """A `.pt` file in the oldest format: a tar archive of pickles."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info, content = tarfile.TarInfo(name), pickle.dumps(payload)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def torch_zip(payload: Payload) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


def object_array(payload: Payload) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    return file.getvalue()


KINDS: dict[str, Callable[[Payload], bytes]] = {
    "pickle": lambda payload: pickle.dumps(payload),
    "legacy tar": legacy_tar,
    "torch zip": torch_zip,
    "object array": object_array,
}


@pytest.fixture(scope="module")
def toy_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_split(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its entry in the manifest, so that the folder verifies."""
    write_bytes(folder / name, content)
    manifest = read_manifest(folder)
    entry = FileEntry(sha256=sha256_of(folder / name), n_bytes=len(content))
    changed = manifest.model_copy(update={"files": {**manifest.files, name: entry}})
    write_bytes(folder / "manifest.json", changed.to_bytes())


READERS: dict[str, Callable[[io.BytesIO], object]] = {
    "pickle": pickle.load,
    "torch zip": lambda file: torch.load(file, weights_only=False),
    "object array": lambda file: np.load(file, allow_pickle=True),
}


@pytest.mark.parametrize("kind", READERS)
def test_each_payload_is_executed_by_an_unsafe_reader(kind: str, canary: Path) -> None:
    READERS[kind](io.BytesIO(KINDS[kind](Payload(canary))))
    assert canary.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_payload_in_a_model_is_rejected(
    tmp_path: Path, canary: Path, kind: str, name: str, toy_split: Path
) -> None:
    folder = tiny.make_model(tmp_path / "gpt")
    content = KINDS[kind](Payload(canary))
    if name == "manifest.json":
        write_bytes(folder / name, content)
    else:
        replace_file(folder, name, content)
    with pytest.raises(GptpipeError) as caught:
        initialise_from(tiny.network(270), folder)
    assert caught.value.exit_code in (3, 4)
    with pytest.raises(GptpipeError) as caught:
        evaluate_model(folder, toy_split, tmp_path / "reports", tiny.params().evaluate, 7)
    assert caught.value.exit_code in (3, 4)
    assert not canary.exists()


def test_weights_in_the_format_of_torch_are_never_read(tmp_path: Path, canary: Path) -> None:
    folder = tiny.make_model(tmp_path / "gpt")
    for name in ("manifest.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_zip(Payload(canary)))
    with pytest.raises(
        InputError, match=r"model\.safetensors: not there; weights must be in safetensors files"
    ):
        initialise_from(tiny.network(270), folder)
    assert not canary.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokens.npy", "documents.parquet"])
def test_a_payload_in_a_split_is_rejected(
    tmp_path: Path, canary: Path, kind: str, name: str, toy_split: Path
) -> None:
    folder = shutil.copytree(toy_split, tmp_path / "split")
    replace_file(folder, f"train/{name}", KINDS[kind](Payload(canary)))
    with pytest.raises(IntegrityError, match="train"):
        open_stream(folder, "train")
    assert not canary.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ranks.tiktoken", "encoding.json"])
def test_a_payload_in_a_tokenizer_is_rejected(
    tmp_path: Path, canary: Path, kind: str, name: str, toy_split: Path
) -> None:
    folder = shutil.copytree(toy_split, tmp_path / "split")
    replace_file(folder, f"tokenizer/{name}", KINDS[kind](Payload(canary)))
    with pytest.raises(IntegrityError, match="tokenizer"):
        Tokenizer.load(folder / "tokenizer")
    assert not canary.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "journal.jsonl"])
def test_a_payload_in_a_checkpoint_is_rejected(tmp_path: Path, canary: Path, kind: str, name: str) -> None:
    state, _, _ = tiny.trained_state(1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    checkpoints.save(state)
    replace_file(tmp_path / "checkpoints/step-00000001", name, KINDS[kind](Payload(canary)))
    with pytest.raises(IntegrityError):
        checkpoints.restore(state, allow_inexact=False)
    assert not canary.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_payload_in_a_source_is_not_executed(
    tmp_path: Path, canary: Path, kind: str, source: str, collect_params: Callable[..., CollectParams]
) -> None:
    (tmp_path / "a").write_bytes(KINDS[kind](Payload(canary)))
    params = collect_params({"kind": source, "paths": (str(tmp_path / "a"),)})
    with suppress(InputError):  # a torch archive also contains a text file, which may be read
        collect(params, tmp_path / "raw")
    assert not canary.exists()

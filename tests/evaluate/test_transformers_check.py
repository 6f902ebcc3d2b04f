"""Model folders in `transformers`: versions 4 and 5 compute what we do, and the check notices where not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from gptpipe.evaluate.difficult_text import difficult_texts
from gptpipe.evaluate.transformers_check import check_with_transformers
from gptpipe.formats.hf_tokenizer import save_tokenizer_json
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.hf_weights import load_model, save_model
from gptpipe.shell.errors import IntegrityError, ResourceError
from gptpipe.tokenize.tokenizers import named_tokenizer, train_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
TRANSFORMERS_4 = ROOT / ".transformers-4"
INSTALL = "pip install --no-deps --target .transformers-4 -r tests/evaluate/transformers-4.txt"
# The script that a test runs with version 4, whose folder stands before that of version 5 in sys.path.
SCRIPT = """
import sys
from pathlib import Path
from gptpipe.evaluate.transformers_check import check_with_transformers
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.hf_weights import load_model
from gptpipe.shell.errors import GptpipeError
for folder in map(Path, sys.argv[1:]):
    tokenizer = Tokenizer.load(folder)
    tokens = tokenizer.encode_documents(["the cat sees the dog in the café"])
    try:
        print(check_with_transformers(folder, load_model(folder), tokenizer, tokens))
    except GptpipeError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Trained on the difficult texts, so that merges show where pieces end."""
    return train_tokenizer([*difficult_texts()], 700)


def save(folder: Path, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A model folder with sharp predictions: the logits of a network of such large random weights are large."""
    folder.mkdir()
    model = tiny.network(tokenizer.vocab_size, context_length=32, **changes)
    save_model(folder, model.params, model.vocab_size, tokenizer.end_of_text, dict(model.named_parameters()))
    tokenizer.save(folder)
    save_tokenizer_json(folder, tokenizer, 32)
    return folder


def check(folder: Path) -> str:
    tokenizer = Tokenizer.load(folder)
    tokens = tokenizer.encode_documents(["the cat sees the dog in the café"])
    return check_with_transformers(folder, load_model(folder), tokenizer, tokens)


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("switches", tiny.SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_version_5_computes_the_same(tmp_path: Path, tokenizer: Tokenizer, switches: dict[str, Any]) -> None:
    line = check(save(tmp_path / "model", tokenizer, **switches))
    assert line.startswith("transformers 5.")
    assert "the same token ids, logits (difference at most " in line


@pytest.mark.slow
def test_version_4_computes_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """All architectures in one process, because importing the library takes seconds; and one folder as it was
    written before, without a rope_theta that version 4 can see."""
    if not TRANSFORMERS_4.is_dir():
        pytest.skip(f"needs transformers 4: {INSTALL}")
    folders = [save(tmp_path / f"{i}", tokenizer, **switches) for i, switches in enumerate(tiny.SWITCHES)]
    folders.append(save(tmp_path / "gpt2", named_tokenizer("gpt2"), rope_theta=3e5))
    old = save(tmp_path / "old", tokenizer, architecture="llama", rope_theta=500.0)
    change_json(old / "config.json", lambda config: config.pop("rope_theta"))
    path = os.pathsep.join(map(str, (TRANSFORMERS_4, ROOT)))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *folders, old],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(folders) + 1
    assert [line for line in lines[:-1] if not line.startswith("transformers 4.57.")] == []
    assert "transformers 4.57.6 computes other logits" in lines[-1]


def pattern_without_marks(tokenizer_json: dict[str, Any]) -> None:
    split = tokenizer_json["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{M}", "")


def special_in_text(tokenizer_config: dict[str, Any]) -> None:
    tokenizer_config["split_special_tokens"] = False


def other_rope(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] = 500.0


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("tokenizer.json", pattern_without_marks, "gives other tokens for "),
        ("tokenizer_config.json", special_in_text, "gives other tokens for '<|endoftext|>'"),
        ("config.json", other_rope, "computes other logits, they differ by"),
    ],
)
def test_a_difference_is_an_integrity_error(
    tmp_path: Path, tokenizer: Tokenizer, file: str, change: Callable[[Any], None], words: str
) -> None:
    folder = save(tmp_path / "model", tokenizer)
    ours = load_model(folder)
    change_json(folder / file, change)
    with pytest.raises(IntegrityError) as caught:
        check_with_transformers(folder, ours, tokenizer, np.arange(32, dtype=np.uint16))
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


def test_other_greedy_text_is_an_integrity_error_unless_two_tokens_are_equally_probable(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", tokenizer)
    monkeypatch.setattr("gptpipe.evaluate.transformers_check._compare_logits", lambda *_: 0.0)
    ours = load_model(folder)
    with torch.no_grad():
        ours.head.weight[:] = ours.head.weight.flip(0)
    with pytest.raises(IntegrityError, match="continues a prompt differently from token 1 on"):
        check_with_transformers(folder, ours, tokenizer, np.arange(32, dtype=np.uint16))
    with torch.no_grad():
        ours.head.weight[:] = 0
    # All tokens are equally probable.
    check_with_transformers(folder, ours, tokenizer, np.arange(32, dtype=np.uint16))


def test_a_folder_that_transformers_cannot_load_is_a_resource_error(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """As with a version that does not know the architecture."""
    folder = save(tmp_path / "model", tokenizer)
    ours = load_model(folder)
    change_json(folder / "config.json", lambda config: config.update(model_type="qwen99"))
    with pytest.raises(
        ResourceError, match=r"transformers cannot load it: .*evaluate\.check_transformers to false"
    ):
        check_with_transformers(folder, ours, tokenizer, np.arange(32, dtype=np.uint16))

"""Hostile model folders, each with a valid manifest: each gives one line and its exit code.

Each takes little time and memory. A child process with a limited address space runs `gptpipe generate --model`
on it, and starts a training from it.
"""

import base64
import contextlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
EXTRA_MEMORY = 1 << 30  # bytes of address space that the child may take after its imports
SECONDS = 10.0  # a case takes about 0.05

Change = Callable[[Path], object]


def config(**changes: Any) -> Change:
    """Keys of config.json; `...` removes one."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_bytes()) | changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def content(name: str, written: bytes | str) -> Change:
    return lambda folder: (folder / name).write_bytes(
        written if isinstance(written, bytes) else written.encode()
    )


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def weights(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        edit(tensors)
        save_file(tensors, path)

    return change


def header(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edit the header of model.safetensors, and leave the data unchanged."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        stored = path.read_bytes()
        size = struct.unpack("<Q", stored[:8])[0]
        entries = json.loads(stored[8 : 8 + size])
        edit(entries)
        head = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + stored[8 + size :])

    return change


def header_size(n_bytes: int) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", n_bytes) + path.read_bytes()[8:])

    return change


def encoding(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / "encoding.json").read_bytes()) | changes
        (folder / "encoding.json").write_text(json.dumps(values))

    return change


def ranks(edit: Callable[[list[bytes]], object]) -> Change:
    """The lines of ranks.tiktoken."""

    def change(folder: Path) -> None:
        lines = (folder / "ranks.tiktoken").read_bytes().splitlines()
        edit(lines)
        (folder / "ranks.tiktoken").write_bytes(b"\n".join(lines) + b"\n")

    return change


def index(weight_map: Any) -> Change:
    return content("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def set_entry(name: str, **changes: Any) -> Change:
    return header(lambda entries: entries[name].update(changes))


EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
DEEP = "[" * 100_000 + "]" * 100_000

# Name -> how a sound folder is changed, and the exit code of `gptpipe generate`.
CASES: dict[str, tuple[Change, int]] = {
    "sound": (lambda folder: None, 0),
    # Sizes in config.json: 3 if no model has them, 4 if the weights have others.
    **{
        f"{key} {value}": (config(**{key: value}), code)
        for key in (
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_size",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        )
        for value, code in ((-1, 3), (0, 3), (2**70, 3), (True, 3), (2.0, 3), ("2", 3), (None, 3))
        if (key, value) != ("head_dim", None) and (key, value) != ("num_key_value_heads", None)
    },
    "10^6 layers": (config(num_hidden_layers=10**6), 4),
    "as many layers as tensors": (config(num_hidden_layers=24), 4),
    "a vocabulary of 10^12": (config(vocab_size=10**12), 3),
    "a vocabulary of 10^9": (config(vocab_size=10**9), 4),
    "a vocabulary of one less": (config(vocab_size=269), 4),
    "a width of 2^62": (config(hidden_size=2**62), 4),
    "heads of 2^62 numbers": (config(head_dim=2**62), 4),
    "2^62 heads": (config(num_attention_heads=2**62, num_key_value_heads=2**62), 4),
    "an inner width of 10^12": (config(intermediate_size=10**12), 4),
    "a context of 10^12": (config(max_position_embeddings=10**12), 3),
    "a context of 2^22": (config(max_position_embeddings=2**22), 3),
    "a context of 1": (config(max_position_embeddings=1), 3),
    "GPT-2's sizes": (config(model_type="gpt2", n_positions=10**6, n_embd=32, n_layer=2, n_head=4), 4),
    "GPT-2 of 2^40 positions": (
        config(model_type="gpt2", n_positions=2**40, n_embd=32, n_layer=2, n_head=4),
        3,
    ),
    "GPT-2 of a width that is a list": (
        config(model_type="gpt2", n_positions=16, n_embd=[1], n_layer=2, n_head=4),
        3,
    ),
    # Other values of config.json.
    "rope_theta of 10^400": (config(rope_parameters={"rope_theta": 10**400}), 3),
    "rope_theta as text": (config(rope_parameters={"rope_theta": "1e4"}), 3),
    "a negative rope_theta": (config(rope_parameters={"rope_theta": -1.0}), 3),
    "rope_theta that makes NaN": (config(rope_parameters={"rope_theta": 1e-300}), 3),
    "a rope type that is a list": (config(rope_parameters={"rope_type": [[]]}), 3),
    "dropout as true": (config(attention_dropout=True), 3),
    "dropout of 10^400": (config(attention_dropout=10**400), 3),
    "a tied head that is 1": (config(tie_word_embeddings=1), 3),
    "an epsilon that is a table": (config(rms_norm_eps={}), 3),
    "a long model_type": (config(model_type="x" * 500_000), 3),
    "a model_type of two lines": (config(model_type="a\nb\x1b[2J"), 3),
    "a model_type that is a table": (config(model_type={"a": 1}), 3),
    "no model_type": (config(model_type=...), 3),
    "no vocab_size": (config(vocab_size=...), 3),
    "NaN": (config(rms_norm_eps=float("nan")), 3),
    "Infinity": (config(rope_theta=float("inf")), 3),
    "1e999": (content("config.json", '{"model_type": "qwen3", "vocab_size": 270, "rope_theta": 1e999}'), 3),
    "deep JSON": (content("config.json", DEEP), 3),
    "a deep value": (content("config.json", f'{{"vocab_size": 270, "model_type": {DEEP}}}'), 3),
    "a number of 5,000 digits": (content("config.json", f'{{"vocab_size": {"1" * 5000}}}'), 3),
    "not UTF-8": (content("config.json", b"\xff\xfe{}"), 3),
    "an empty config": (content("config.json", b""), 3),
    "a list": (content("config.json", "[]"), 3),
    "a config of 2 MB": (content("config.json", b" " * (2 << 20) + b"{}"), 3),
    "a config that is a FIFO": (fifo("config.json"), 3),
    # The weights.
    "empty weights": (content("model.safetensors", b""), 4),
    "weights of 7 bytes": (content("model.safetensors", b"\x02\0\0\0\0\0\0"), 4),
    "a header of 2^63 bytes": (header_size(2**63), 4),
    "a header of 90 MB": (header_size(90 << 20), 4),
    "a header of 100,000 bytes": (header_size(100_000), 4),
    "a header of nothing": (header_size(0), 4),
    "a deep header": (content("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP.encode()), 4),
    "a header that is a list": (content("model.safetensors", struct.pack("<Q", 2) + b"[]"), 4),
    "a shape of 10^12": (set_entry(EMBEDDING, shape=[10**12, 32]), 4),
    "a shape whose product overflows": (set_entry(EMBEDDING, shape=[2**40, 2**40]), 4),
    "a negative shape": (set_entry(EMBEDDING, shape=[-270, -32]), 4),
    "a shape of 0": (set_entry(EMBEDDING, shape=[0, 32]), 4),
    "a shape that is text": (set_entry(EMBEDDING, shape="270"), 4),
    "offsets that overlap": (header(lambda e: e[EMBEDDING].update(data_offsets=e[UP]["data_offsets"])), 4),
    "offsets beyond the end": (set_entry(EMBEDDING, data_offsets=[0, 2**62]), 4),
    "offsets in reverse": (set_entry(EMBEDDING, data_offsets=[100, 0]), 4),
    "a type that is unknown": (set_entry(EMBEDDING, dtype="Q4"), 4),
    "another type of the same size": (set_entry(EMBEDDING, dtype="I32"), 4),
    "bytes": (weights(lambda t: t.update({UP: t[UP].to(torch.int8)})), 4),
    "8-bit floats": (weights(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})), 4),
    "a tensor is missing": (weights(lambda t: t.pop(UP)), 4),
    "a layer too many": (weights(lambda t: t.update({UP.replace(".1.", ".2."): t[UP].clone()})), 4),
    "a bias": (weights(lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)})), 4),
    "a tensor with a name of two lines": (weights(lambda t: t.update({"a\nb": torch.ones(1)})), 4),
    "a transposed tensor": (weights(lambda t: t.update({UP: t[UP].T.contiguous()})), 4),
    "a scalar": (weights(lambda t: t.update({UP: torch.tensor(1.0)})), 4),
    "a row that would be broadcast": (weights(lambda t: t.update({UP: t[UP][:1].clone()})), 4),
    "weights that are NaN": (weights(lambda t: t[UP].fill_(torch.nan)), 4),
    "weights that become infinite": (weights(lambda t: t.update({UP: t[UP].double() * 1e300})), 4),
    "weights whose logits are infinite": (weights(lambda t: t["model.norm.weight"].fill_(3e38)), 6),
    "weights that are a FIFO": (fifo("model.safetensors"), 3),
    # The index.
    "an index of numbers": (index({"a": 1}), 3),
    "an index of lists": (index({"a": ["model.safetensors"]}), 3),
    "an index that is a list": (index([]), 3),
    "an index of nothing": (index({}), 4),
    "an index without a map": (content("model.safetensors.index.json", "{}"), 3),
    "a deep index": (content("model.safetensors.index.json", f'{{"weight_map": {DEEP}}}'), 3),
    "an index that leads out": (index({"a": "../outside.safetensors"}), 3),
    "an index that leads far out": (index({"a": "/etc/passwd"}), 3),
    "an index of a folder": (index({"a": "."}), 3),
    "an index with a null byte": (index({"a": "a\0.safetensors"}), 3),
    "an index with a line feed": (index({"a": "a\n.safetensors"}), 3),
    "an index with a long name": (index({"a": "a" * 5000 + ".safetensors"}), 3),
    "an index of a missing file": (index({"a": "b.safetensors"}), 3),
    "tensors that are in two files": (
        both(
            lambda f: shutil.copy(f / "model.safetensors", f / "b.safetensors"),
            index({"a": "b.safetensors", "b": "model.safetensors"}),
        ),
        4,
    ),
    # The tokenizer.
    "an empty pattern": (encoding(pattern=""), 4),
    "a pattern that is no regex": (encoding(pattern="("), 4),
    "a pattern that backtracks": (encoding(pattern="(?:(?=a)a+)+b"), 4),
    "a pattern that loses text": (encoding(pattern="[a-z]"), 4),
    "a pattern that is huge": (encoding(pattern="(a{1000}){1000}"), 4),
    "a pattern that is a number": (encoding(pattern=1), 4),
    **{
        f"end of text {value!r}": (encoding(special_tokens={"<|endoftext|>": value}), 4)
        for value in (-1, 2**40, 2**31 - 1, 2**70, 5, True, 269.0, "269", None)
    },
    "a special token that collides": (encoding(special_tokens={"<|endoftext|>": 269, "<|a|>": 269}), 4),
    "an empty special token": (encoding(special_tokens={"<|endoftext|>": 269, "": 270}), 4),
    "special tokens that are a list": (encoding(special_tokens=["<|endoftext|>"]), 4),
    "no end of text": (encoding(special_tokens={"<|end|>": 269}), 4),
    "another vocabulary than the network's": (encoding(special_tokens={"<|endoftext|>": 269, "<|a|>": 270}), 4),
    "an unknown key": (encoding(merges=[]), 4),
    "a deep encoding": (content("encoding.json", DEEP), 4),
    "an encoding that is a FIFO": (fifo("encoding.json"), 4),
    "ranks that are a FIFO": (fifo("ranks.tiktoken"), 4),
    "an encoding of 2 MB": (encoding(name="x" * (2 << 20)), 4),
    "no ranks": (content("ranks.tiktoken", b""), 4),
    "a rank twice": (ranks(lambda lines: lines.__setitem__(7, lines[7].split()[0] + b" 8")), 4),
    "a token twice": (ranks(lambda lines: lines.append(lines[0].split()[0] + b" 268")), 4),
    "an empty token": (ranks(lambda lines: lines.append(b" 270")), 4),
    "a missing byte": (ranks(lambda lines: lines.pop(97)), 4),
    "a negative rank": (ranks(lambda lines: lines.__setitem__(7, lines[7].split()[0] + b" -7")), 4),
    "a rank of 2^40": (ranks(lambda lines: lines.append(base64.b64encode(b"abc") + b" %d" % 2**40)), 4),
    "a rank of 5,000 digits": (
        ranks(lambda lines: lines.append(base64.b64encode(b"abc") + b" " + b"1" * 5000)),
        4,
    ),
    "a rank with an underscore": (ranks(lambda lines: lines.append(base64.b64encode(b"abc") + b" 2_7")), 4),
    "a line of one word": (ranks(lambda lines: lines.append(b"YWJj")), 4),
    "a line of three words": (ranks(lambda lines: lines.append(b"YWJj 270 271")), 4),
    "bad base64": (ranks(lambda lines: lines.append(b"YWJ 270")), 4),
}


def main(folder: Path) -> None:
    """Run every case and print the results as JSON: the exit code and the messages of both uses."""
    import tiny

    from gptpipe.base.manifest import new_folder
    from gptpipe.commands import cli
    from gptpipe.model.hf_weights import initialise_from
    from gptpipe.shell.process import run

    def observed(work: Callable[[], object]) -> dict[str, Any]:
        errors, code, started = io.StringIO(), 0, time.monotonic()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                run(lambda: work() and None)
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException as error:  # a panic of Rust is no Exception
                code = -1
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return {"code": code, "errors": errors.getvalue(), "seconds": time.monotonic() - started}

    sound, model = tiny.make_model(folder / "sound"), tiny.network(270)
    arguments = ["generate", "the cat", "--max-new-tokens", "2", "--model"]
    observed(lambda: cli._dispatch([*arguments, str(sound)]))  # imports everything
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_MEMORY, size + EXTRA_MEMORY))
    results = {}
    for i, (name, (change, _)) in enumerate(CASES.items()):
        hostile = folder / str(i)
        with new_folder(hostile, {}) as new:
            for path in sound.iterdir():
                if path.name != "manifest.json":
                    shutil.copy(path, new.path)
            change(new.path)
        generated = observed(lambda hostile=hostile: cli._dispatch([*arguments, str(hostile)]))
        (hostile / "manifest.json").unlink()  # as in a folder from elsewhere
        results[name] = [generated, observed(lambda hostile=hostile: initialise_from(model, hostile))]
        shutil.rmtree(hostile)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("hostile")
    paths = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    child = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, child.stderr) == (0, "")  # a panic of Rust prints to the process's own stderr
    outcomes: dict[str, list[dict[str, Any]]] = json.loads(child.stdout)
    return outcomes


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_model_folder_gives_one_line_and_the_expected_exit_code(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    generated, started = results[name]
    assert generated["code"] == CASES[name][1], generated["errors"]
    assert started["code"] in (0, 2, 3, 4), started["errors"]  # 0: a training does not read the tokenizer here
    for outcome in (generated, started):
        assert len(outcome["errors"].splitlines()) == (outcome["code"] != 0), outcome["errors"]
        assert len(outcome["errors"]) < 1000
        assert outcome["seconds"] < SECONDS


if __name__ == "__main__":
    main(Path(sys.argv[1]))

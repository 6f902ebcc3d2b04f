"""params.yaml: the shipped file loads, and all invalid values are reported at once, each with its key."""

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from gptpipe.params import Params, load_params
from gptpipe.shell.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = (ROOT / "params.yaml").read_text()


FIXED = {
    "val_fraction": "0.05",
    "test_fraction": "0.05",
    "architecture": "qwen3",
    "context_length": "256",
    "n_head": "2",
    "n_kv_head": "2",
    "n_embd": "128",
    "head_dim": "null",
    "tie_embeddings": "true",
    "warmup_steps": "50",
    "batch_size": "8",
    "micro_batch_size": "null",
    "stride": "128",
    "epochs": "null",
    "max_steps": "1000",
    "lr": "1.0",
}


def edited(**lines: str) -> str:
    """The shipped file, with fixed or given values instead of those that are tuned."""
    text = SHIPPED
    for name, value in {**FIXED, **lines}.items():
        before, after = text.split(f"  {name}: ", 1) if name != "seed" else ("", text.split("seed: ", 1)[1])
        rest = after.split("\n", 1)[1]
        text = f"{before}{'' if name == 'seed' else '  '}{name}: {value}\n{rest}"
    return text


def load(folder: Path, text: str | bytes) -> Params:
    path = folder / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_params(path)


def faults(folder: Path, text: str | bytes) -> list[str]:
    """The lines of the error message, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    assert caught.value.exit_code == 2
    return [line.removeprefix(f"{folder / 'params.yaml'}: ") for line in str(caught.value).split("\n")]


def test_the_shipped_file_loads() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.collect.sources[0].kind == "python-docs"
    assert (params.split.val_fraction, params.split.test_fraction) == (0.05, 0.05)


def test_every_key_of_the_shipped_file_has_a_comment() -> None:
    """On its line. A section at the top level needs none."""
    for line in SHIPPED.splitlines():
        code = line.partition("#")[0]
        has_key = ":" in code
        is_section = code.rstrip().endswith(":") and not code.startswith(" ")
        if has_key and not is_section:
            assert " # " in line, line


def test_params_are_frozen(params: Params) -> None:
    with pytest.raises(ValueError, match="frozen"):
        params.train.lr = 1.0


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ({"lr": "-0.1"}, "train.lr: Input should be greater than 0, got -0.1"),
        ({"lr": "0"}, "train.lr: Input should be greater than 0, got 0"),
        ({"lr": ".nan"}, "train.lr: Input should be a finite number, got nan"),
        ({"lr": ".inf"}, "train.lr: Input should be a finite number, got inf"),
        ({"lr": "abc"}, "train.lr: Input should be a valid number, got 'abc'"),
        ({"lr": "'1e-4'"}, "train.lr: Input should be a valid number, got '1e-4'"),
        ({"lr": "true"}, "train.lr: Input should be a valid number"),
        ({"lr": "null"}, "train.lr: Input should be a valid number"),
        ({"stride": "0"}, "train.stride: Input should be greater than or equal to 1, got 0"),
        (
            {"stride": "257"},
            "train.stride: above model.context_length 256: "
            "tokens between two windows would never be trained on, got 257",
        ),
        ({"n_head": "3"}, "model.head_dim: n_head 3 must divide n_embd 128 if head_dim is null"),
        ({"n_kv_head": "3"}, "model.n_kv_head: must divide n_head 2, got 3"),
        ({"n_kv_head": "0"}, "model.n_kv_head: Input should be greater than or equal to 1, got 0"),
        ({"head_dim": "31"}, "model.head_dim: rotary positions need an even head_dim, it is 31, got 31"),
        (
            {"architecture": "gpt3"},
            "model.architecture: Input should be 'gpt2', 'llama' or 'qwen3', got 'gpt3'",
        ),
        (
            {"architecture": "gpt2", "n_kv_head": "1"},
            "model.n_kv_head: gpt2 has one key and value head per query head: set it to 2, got 1",
        ),
        (
            {"architecture": "gpt2", "head_dim": "32"},
            "model.head_dim: the head_dim of gpt2 is always n_embd / n_head: set it to null, got 32",
        ),
        (
            {"architecture": "gpt2", "tie_embeddings": "false"},
            "model.tie_embeddings: gpt2 uses one matrix for input and output: set it to true",
        ),
        ({"dropout": "1.0"}, "model.dropout: Input should be less than 1, got 1.0"),
        ({"dropout": "-0.1"}, "model.dropout: Input should be greater than or equal to 0, got -0.1"),
        ({"warmup_steps": "1000"}, "train.max_steps: must be above warmup_steps 1000, got 1000"),
        ({"max_steps": "null"}, "train.max_steps: one of epochs and max_steps must be set"),
        ({"micro_batch_size": "3"}, "train.micro_batch_size: must divide batch_size 8, got 3"),
        ({"batch_size": "2.5"}, "train.batch_size: Input should be a valid integer, got 2.5"),
        ({"compile": "maybe"}, "train.compile: Input should be 'auto', True or False, got 'maybe'"),
        ({"tie_embeddings": "yes"}, "model.tie_embeddings: Input should be a valid boolean, got 'yes'"),
        ({"tie_embeddings": "no"}, "model.tie_embeddings: Input should be a valid boolean, got 'no'"),
        ({"betas": "[0.9]"}, "train.betas.1: missing"),
        ({"betas": "[0.9, 1.0]"}, "train.betas.1: Input should be less than 1, got 1.0"),
        (
            {"val_fraction": "0.95"},
            "split.test_fraction: val_fraction + test_fraction must be below 1, got 0.05",
        ),
        ({"vocab_size": "256"}, "tokenize.vocab_size: Input should be greater than or equal to 257, got 256"),
        ({"vocab_size": "1e12"}, "tokenize.vocab_size: Input should be a valid integer, got 1000000000000.0"),
        ({"seed": "-1"}, "seed: Input should be greater than or equal to 0, got -1"),
        ({"dedup": "fuzzy"}, "collect.dedup: Input should be 'none', 'exact' or 'near', got 'fuzzy'"),
        (
            {"max_document_bytes": "6"},
            "collect.max_document_bytes: Input should be greater than or equal to 64, got 6",
        ),
        ({"sample_prompts": "text\n  x:"}, "train.x: unknown key"),
        ({"  words": "[9]"}, "collect.filters.words.1: missing"),
        (
            {"  words": "null\n    ellipsis_line: 1"},
            "collect.filters.ellipsis_line: unknown key; did you mean `ellipsis_lines`?",
        ),
        (
            {"  bullet_lines": "1.5"},
            "collect.filters.bullet_lines: Input should be less than or equal to 1, got 1.5",
        ),
    ],
)
def test_an_invalid_value_is_reported_with_its_key(tmp_path: Path, lines: dict[str, str], fault: str) -> None:
    assert fault in faults(tmp_path, edited(**lines))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (
            "{kind: texts, paths: [a]}",
            "collect.sources.0: Input tag 'texts' found using 'kind' does not match any of "
            "the expected tags: 'python-docs', 'python-code', 'text', 'jsonl', 'parquet', 'url', "
            "'huggingface'",
        ),
        (
            "{kind: huggingface, dataset: a/b}",
            "collect.sources.0.huggingface.revision: is required for a dataset of the hub: "
            "the 40 hex digits of a commit; a/b is not a local folder",
        ),
        ("{kind: text}", "collect.sources.0.text.paths: missing"),
        ("{kind: text, path: [a]}", "collect.sources.0.text.path: unknown key; did you mean `paths`?"),
        (
            "{kind: text, paths: a.txt}",
            "collect.sources.0.text.paths: Input should be a valid array, got 'a.txt'",
        ),
        (
            "{kind: text, paths: []}",
            "collect.sources.0.text.paths: Tuple should have at least 1 item after validation, not 0",
        ),
        (
            "{kind: text, paths: [a], document: separator}",
            "collect.sources.0.text.separator: is required with `document: separator`, "
            "and not allowed without it",
        ),
        (
            "{kind: text, paths: [a], separator: x}",
            "collect.sources.0.text.separator: is required with `document: separator`, "
            "and not allowed without it, got 'x'",
        ),
        (
            "{kind: jsonl, paths: [a], text_column: t}",
            "collect.sources.0.jsonl.text_column: unknown key; did you mean `text_key`?",
        ),
    ],
)
def test_an_invalid_source_is_reported_with_its_key(tmp_path: Path, source: str, fault: str) -> None:
    assert fault in faults(tmp_path, SHIPPED.replace("- kind: python-docs ", f"- {source} "))


def test_an_invalid_item_is_reported_and_its_list_is_not(tmp_path: Path) -> None:
    text = SHIPPED.replace("- kind: python-docs ", "- {kind: huggingface, dataset: a/b} ")
    assert faults(tmp_path, text) == [
        "collect.sources.0.huggingface.revision: is required for a dataset of the hub: "
        "the 40 hex digits of a commit; a/b is not a local folder"
    ]


@pytest.mark.parametrize("value", ["1e-05", "1e-5", "0.00001", "1.0E-5"])
def test_numbers_are_read_as_in_yaml_1_2(tmp_path: Path, value: str) -> None:
    assert load(tmp_path, edited(lr=value)).train.lr == 1e-05


def test_unknown_missing_and_invalid_keys_are_reported_together(tmp_path: Path) -> None:
    text = edited(lr="-1", stride="999", dropout="2", n_kv_head="3", warmup_steps="5000", micro_batch_size="7")
    text = text.replace("  grad_clip:", "  grad_clp:").replace("evaluate:", "evalute:")
    messages = faults(tmp_path, text)
    assert {line.split(": ")[0] for line in messages} == {
        "model.dropout",
        "model.n_kv_head",
        "train.lr",
        "train.stride",
        "train.max_steps",
        "train.micro_batch_size",
        "train.grad_clip",
        "train.grad_clp",
        "evaluate",
        "evalute",
    }
    assert "train.grad_clp: unknown key; did you mean `grad_clip`?" in messages
    assert "train.grad_clip: missing" in messages
    assert "evalute: unknown key; did you mean `evaluate`?" in messages
    assert "evaluate: missing" in messages


@pytest.mark.parametrize(
    "name", ["collect.filters.words", "split.ngram", "split.benchmarks", "split.max_contamination"]
)
def test_a_missing_key_has_no_default(tmp_path: Path, name: str) -> None:
    kept = [
        line
        for line in SHIPPED.splitlines(keepends=True)
        if not line.strip().startswith(name.split(".")[-1] + ":")
    ]
    assert faults(tmp_path, "".join(kept)) == [f"{name}: missing"]


NINES = "[" + ", ".join(["*{0}"] * 9) + "]"
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} {NINES.format(f'a{i - 1}')}\n" for i in range(1, 10))
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: {NINES.format(f'a{i - 1}')}}}\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (ALIASES, "more than 10,000 values, with each alias expanded"),
        (MERGES, "more than 10,000 values, with each alias expanded"),
        ("a: [" + "1," * 20_000 + "]", "more than 10,000 values; start from"),
        ("#" * 300_000, "more than 262,144 bytes"),
        ("a: &x {b: *x}\n", "not plain YAML: a value that contains itself"),
        ("a: &x {<<: *x}\n", "not plain YAML: a value that contains itself"),
        ("a: !!bool maybe\n", "not plain YAML: 'maybe'"),
        ("a: !!int ''\n", "not plain YAML: string index out of range"),
        ("a: !!set {b, c}\n", "not plain YAML: Object of type set"),
        ("a: !!timestamp nope\n", "failed to construct timestamp"),
        ("seed: 0x" + "f" * 10_000 + "\n", "not plain YAML: Exceeds the limit"),
        ("seed: 1:30:30\n", "seed: Input should be a valid integer, got '1:30:30'"),
        ("seed: " + "x" * 1000 + "\n", f"seed: Input should be a valid integer, got '{'x' * 99}..."),
        ("x" * 900 + ": 1\n", f"{'x' * 100}...: unknown key"),
        ('"a\\x1b[31m\\nb": 1\n', r"a\x1b[31m\nb: unknown key"),
        ("".join(f"k{i}: 1\n" for i in range(200)), "and 107 more"),
        ("", "contains no sections"),
        ("- seed\n", "contains no sections"),
        ("model: 5\n", "model: Input should be an object"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("a:\n\t- b\n", "line 2: found character"),
        ("a: [1\n", "line 2: expected ',' or ']'"),
        ("a: \x00\n", "not plain YAML: unacceptable character"),
        (b"a: \xff\n", "not plain YAML: unacceptable character"),
        ("a: 2020-01-01\n", "not plain YAML"),
        ("a: !!binary aGVsbG8=\n", "not plain YAML"),
        ("a: &x [*x]\n", "not plain YAML"),
        ("? [a, b]\n: 1\n", "not plain YAML"),
        ("seed: " + "9" * 5000 + "\n", "not plain YAML"),
        ("[" * 1000, "not plain YAML"),
        ('a: "\\ud800"\n', "Invalid JSON"),
        (SHIPPED.replace("  lr: ", "  lr: 1.0\n  lr: "), 'found duplicate key "lr"'),
    ],
)
def test_an_unreadable_file_is_a_config_error(tmp_path: Path, text: str | bytes, fault: str) -> None:
    messages = faults(tmp_path, text)
    assert any(fault in line for line in messages), messages


def test_the_error_for_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"params\.yaml: No such file or directory; run from the project's root"
    ):
        load_params(tmp_path / "params.yaml")


def test_nested_aliases_take_little_memory_and_time(tmp_path: Path) -> None:
    """Nine levels of aliases in 400 bytes once took 46 s and 3.9 GB. Other processes do not affect CPU time."""
    before = time.process_time()
    tracemalloc.start()
    try:
        for text in (ALIASES, MERGES):
            faults(tmp_path, text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - before < 2
    assert peak < 16 << 20


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_selects_the_encoding(tmp_path: Path, encoding: str) -> None:
    assert load(tmp_path, SHIPPED.encode(encoding)) == load(tmp_path, SHIPPED)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_a_python_tag_is_not_executed(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    messages = faults(tmp_path, edited(launcher=f"{tag} ['touch {canary}']"))
    assert "could not determine a constructor for the tag" in messages[0]
    assert not canary.exists()


@pytest.mark.parametrize("stage", ["collect", "tokenize", "split", "train", "evaluate"])
def test_a_stage_reports_all_invalid_parameters_before_it_writes_a_file(tmp_path: Path, stage: str) -> None:
    text = edited(lr=".nan", stride="0", n_head="3", dropout="1.0", warmup_steps="5000", tie_embeddings="yes")
    (tmp_path / "params.yaml").write_text(text.replace("  grad_clip:", "  grad_clp:"))
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.removeprefix("error: ").splitlines()
    assert "params.yaml: train.lr: Input should be a finite number, got nan" in lines
    assert {line.split(": ")[1] for line in lines} == {
        "model.n_kv_head",
        "model.head_dim",
        "model.dropout",
        "model.tie_embeddings",
        "train.lr",
        "train.stride",
        "train.max_steps",
        "train.grad_clip",
        "train.grad_clp",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_the_number_of_steps_is_the_smaller_of_max_steps_and_epochs(params: Params) -> None:
    section = params.train.model_copy(update={"batch_size": 8, "max_steps": 100, "epochs": 1.5})
    assert section.n_steps(n_windows=64) == 12
    assert section.n_steps(n_windows=65) == 13  # 97.5 windows need a thirteenth batch
    assert section.n_steps(n_windows=6400) == 100
    assert section.model_copy(update={"epochs": None}).n_steps(n_windows=64) == 100
    assert section.model_copy(update={"max_steps": None}).n_steps(n_windows=6400) == 1200

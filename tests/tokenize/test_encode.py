"""Stage tokenize: every document is encoded, and only train documents shape the vocabulary."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sections import side_of, split_params, tokenize_params

from gptpipe.base.manifest import new_folder, verify
from gptpipe.collect import shards
from gptpipe.formats.corpus import id_of, shard_paths
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError
from gptpipe.split.params import SplitParams
from gptpipe.tokenize import encode
from gptpipe.tokenize.encode import tokenize
from gptpipe.tokenize.params import TokenizeParams
from gptpipe.tokenize.tokenizers import train_tokenizer

Corpus = Callable[[Iterable[str]], Path]
SEED = 7


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        row for shard in sorted(folder.glob("tokens-*.parquet")) for row in pq.read_table(shard).to_pylist()
    ]


def side(text: str, params: SplitParams) -> str:
    return side_of(id_of(text.encode()), params, SEED)


def test_every_document_is_encoded_and_ends_with_end_of_text(
    tmp_path: Path, corpus: Corpus, sentences: list[str], trained: TokenizeParams, fifths: SplitParams
) -> None:
    texts = [*sentences, "with <|endoftext|> in it", "ünï"]
    raw = corpus(texts)
    counts = tokenize(raw, tmp_path / "tokens", trained, fifths.fractions, SEED)
    tokenizer = Tokenizer.load(tmp_path / "tokens" / "tokenizer")
    encoded = rows(tmp_path / "tokens")
    assert [tokenizer.decode(row["tokens"]) for row in encoded] == texts
    assert [row["id"] for row in encoded] == [id_of(text.encode()) for text in texts]
    assert [row["n_bytes"] for row in encoded] == [len(text.encode()) for text in texts]
    for row in encoded:
        assert row["tokens"].index(399) == len(row["tokens"]) - 1
    assert counts == {
        "documents": 302,
        "tokens": sum(len(row["tokens"]) for row in encoded),
        "bytes": sum(len(text.encode()) for text in texts),
        "vocab_size": 400,
    }
    manifest = verify(tmp_path / "tokens")
    assert manifest.counts == counts
    assert manifest.made_from["raw"] == verify(raw).digest
    schema = pq.read_schema(tmp_path / "tokens" / "tokens-00000.parquet")
    assert schema.field("tokens").type == pa.list_(pa.uint16())


def test_words_of_val_and_test_alone_do_not_shape_the_vocabulary(
    tmp_path: Path, corpus: Corpus, sentences: list[str], trained: TokenizeParams, fifths: SplitParams
) -> None:
    """Held-out documents repeat a word that no train document has; no token may have two of its letters."""
    texts = [text if side(text, fifths) == "train" else text + " QZQZQZQZ" * 50 for text in sentences]
    texts = [text for text in texts if ("QZ" in text) == (side(text, fifths) != "train")]
    assert 50 < sum("QZ" in text for text in texts) < 200
    tokenize(corpus(texts), tmp_path / "tokens", trained, fifths.fractions, SEED)
    ranks = Tokenizer.load(tmp_path / "tokens" / "tokenizer").ranks
    assert [token for token in ranks if len(token) > 1 and (b"Q" in token or b"Z" in token)] == []

    # The same text on the train side does shape it.
    everything = split_params(val_fraction=0.0, test_fraction=0.0)
    tokenize(tmp_path / "raw", tmp_path / "all", trained, everything.fractions, SEED)
    assert b" QZQZQZQZ" in Tokenizer.load(tmp_path / "all" / "tokenizer").ranks


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among 99"])
def test_a_document_that_contains_a_special_token_survives_a_round_trip(
    tmp_path: Path, corpus: Corpus, fifths: SplitParams, alone: bool
) -> None:
    hostile = "a <|endoftext|> b"
    raw = corpus([*([] if alone else [f"good document number {i}" for i in range(99)]), hostile])
    tokenize(raw, tmp_path / "tokens", tokenize_params(encoding="gpt2"), fifths.fractions, SEED)
    encoded = [row["tokens"] for row in rows(tmp_path / "tokens")]
    assert [tokens.count(50256) for tokens in encoded] == [1] * (1 if alone else 100)
    assert Tokenizer.load(tmp_path / "tokens/tokenizer").decode(encoded[-1][:-1]) == hostile


def test_at_most_training_bytes_of_text_train_the_vocabulary(
    tmp_path: Path, corpus: Corpus, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training needs memory for each distinct word, so its text must not grow with the corpus."""
    seen: list[str] = []
    really = encode.build_tokenizer
    monkeypatch.setattr(encode, "build_tokenizer", lambda params, texts: really(params, _recorded(texts, seen)))
    everything = split_params(val_fraction=0.0, test_fraction=0.0)
    raw = corpus(sentences)
    n_bytes = sum(len(text.encode()) for text in sentences)
    tokenize(
        raw,
        tmp_path / "all",
        tokenize_params(vocab_size=400, training_bytes=n_bytes),
        everything.fractions,
        SEED,
    )
    assert seen == sentences
    seen.clear()
    tokenize(
        raw,
        tmp_path / "third",
        tokenize_params(vocab_size=400, training_bytes=n_bytes // 3),
        everything.fractions,
        SEED,
    )
    assert seen == [
        text for text in sentences if int(id_of(text.encode())[16:24], 16) < n_bytes // 3 / n_bytes * 2**32
    ]
    assert 70 < len(seen) < 130


def _recorded(texts: Iterable[str], seen: list[str]) -> Iterator[str]:
    for text in texts:
        seen.append(text)
        yield text


def test_the_vocabulary_does_not_depend_on_held_out_documents(
    tmp_path: Path, corpus: Corpus, sentences: list[str], trained: TokenizeParams, fifths: SplitParams
) -> None:
    kept = [text for text in sentences if side(text, fifths) == "train"]
    tokenize(corpus(sentences), tmp_path / "all", trained, fifths.fractions, SEED)
    tokenize(corpus(kept), tmp_path / "kept", trained, fifths.fractions, SEED)
    files = [verify(tmp_path / name).files for name in ("all", "kept")]
    assert files[0]["tokenizer/ranks.tiktoken"] == files[1]["tokenizer/ranks.tiktoken"]


def test_gpt2_encoding_gives_the_published_ids(tmp_path: Path, corpus: Corpus, fifths: SplitParams) -> None:
    raw = corpus(["Hello, world!", *map(str, range(20))])
    tokenize(raw, tmp_path / "tokens", tokenize_params(encoding="gpt2"), fifths.fractions, SEED)
    assert rows(tmp_path / "tokens")[0]["tokens"] == [15496, 11, 995, 0, 50256]


def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path,
    corpus: Corpus,
    sentences: list[str],
    trained: TokenizeParams,
    fifths: SplitParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One worker; two threads; two processes."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    raw = corpus(sentences)
    for name, workers, small_bytes in (("one", "1", 1 << 30), ("threads", "2", 1 << 30), ("processes", "2", 0)):
        monkeypatch.setenv("GPTPIPE_WORKERS", workers)
        monkeypatch.setattr(encode, "_SMALL_BYTES", small_bytes)
        tokenize(raw, tmp_path / name, trained, fifths.fractions, SEED)
    assert len(list((tmp_path / "one").glob("tokens-*.parquet"))) == len(shard_paths(raw)) >= 3
    assert verify(tmp_path / "one").digest == verify(tmp_path / "threads").digest
    assert verify(tmp_path / "one").digest == verify(tmp_path / "processes").digest


def test_the_tokenizer_is_loaded_once_and_again_when_it_changes(
    tmp_path: Path,
    corpus: Corpus,
    sentences: list[str],
    trained: TokenizeParams,
    fifths: SplitParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not once per shard: that takes a second for a large vocabulary."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    loaded: list[Path] = []
    really = Tokenizer.load
    monkeypatch.setattr(Tokenizer, "load", lambda folder: loaded.append(folder) or really(folder))
    raw = corpus(sentences)
    assert len(shard_paths(raw)) >= 3
    tokenize(raw, tmp_path / "tokens", trained, fifths.fractions, SEED)
    assert len(loaded) == 1
    counts = tokenize(raw, tmp_path / "tokens", tokenize_params(vocab_size=401), fifths.fractions, SEED)
    assert (counts["vocab_size"], len(loaded)) == (401, 2)


KILLED = """
import os, sys
from pathlib import Path
from gptpipe.split.params import SplitParams
from gptpipe.tokenize.params import TokenizeParams
from gptpipe.tokenize.tokenizers import train_tokenizer
from gptpipe.tokenize import encode
really, shards = encode._encode_shard, []
def encode_shard(shard, path, tokenizer):
    if len(shards) == 2:
        os.kill(os.getpid(), 9)
    shards.append(shard)
    return really(shard, path, tokenizer)
encode._encode_shard = encode_shard
trained = TokenizeParams(encoding="trained", vocab_size=400, training_bytes=1 << 27)
fifths = SplitParams(val_fraction=0.2, test_fraction=0.2, ngram=13, benchmarks=(), max_contamination=None)
encode.tokenize(Path("raw"), Path("tokens"), trained, fifths.fractions, 7)
"""


@pytest.mark.parametrize("damage", [False, True])
def test_after_a_kill_finished_shards_are_kept(
    tmp_path: Path,
    corpus: Corpus,
    sentences: list[str],
    trained: TokenizeParams,
    fifths: SplitParams,
    monkeypatch: pytest.MonkeyPatch,
    damage: bool,
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    raw = corpus(sentences)
    tokenize(raw, tmp_path / "undisturbed", trained, fifths.fractions, SEED)
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path)
    assert killed.returncode == -9
    assert not (tmp_path / "tokens").exists()
    (left,) = tmp_path.glob(".tokens.*.partial")
    assert [path.name for path in sorted(left.glob("tokens-*"))] == [
        "tokens-00000.parquet",
        "tokens-00001.parquet",
    ]
    if damage:
        content = bytearray((left / "tokens-00001.parquet").read_bytes())
        content[len(content) // 2] ^= 1
        (left / "tokens-00001.parquet").write_bytes(content)
    made, trainings, really = [], [], encode._encode_shard
    monkeypatch.setattr(
        encode, "_encode_shard", lambda shard, *rest: made.append(shard.name) or really(shard, *rest)
    )
    monkeypatch.setattr(encode, "build_tokenizer", lambda *_: trainings.append(1))
    tokenize(raw, tmp_path / "tokens", trained, fifths.fractions, SEED)
    n_shards = len(shard_paths(raw))
    assert n_shards >= 5
    assert made == [f"docs-{i:05d}.parquet" for i in range(1 if damage else 2, n_shards)]
    assert trainings == []
    assert verify(tmp_path / "tokens").digest == verify(tmp_path / "undisturbed").digest
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt", "raw", "tokens", "undisturbed"}


def test_leftovers_of_a_kill_with_other_parameters_are_removed(
    tmp_path: Path, corpus: Corpus, sentences: list[str], trained: TokenizeParams, fifths: SplitParams
) -> None:
    raw = corpus(sentences)
    subprocess.run([sys.executable, "-c", KILLED.replace("== 2", "== 0")], cwd=tmp_path)
    (left,) = tmp_path.glob(".tokens.*.partial")
    assert (left / "tokenizer" / "ranks.tiktoken").exists()
    other = tokenize_params(vocab_size=401)
    assert tokenize(raw, tmp_path / "tokens", other, fifths.fractions, SEED)["vocab_size"] == 401
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt", "raw", "tokens"}


def test_no_train_document_is_an_input_error(tmp_path: Path, corpus: Corpus, trained: TokenizeParams) -> None:
    held_out = split_params(val_fraction=0.5, test_fraction=0.499)
    text = next(str(i) for i in range(100) if side(str(i), held_out) != "train")
    with pytest.raises(InputError, match="no document is on the train side"):
        tokenize(corpus([text]), tmp_path / "tokens", trained, held_out.fractions, SEED)
    assert not (tmp_path / "tokens").exists()


def test_a_damaged_corpus_is_an_error_before_anything_is_written(
    tmp_path: Path, corpus: Corpus, sentences: list[str], trained: TokenizeParams, fifths: SplitParams
) -> None:
    shard = corpus(sentences) / "docs-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"docs-00000\.parquet: differs from its manifest"):
        tokenize(tmp_path / "raw", tmp_path / "tokens", trained, fifths.fractions, SEED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "raw"]


def test_the_tokens_of_a_model_are_used_and_belong_to_the_key(
    tmp_path: Path, corpus: Corpus, sentences: list[str], trained: TokenizeParams, fifths: SplitParams
) -> None:
    """An interrupted stage does not continue with the tokens of a folder that was replaced."""
    raw = corpus(sentences)
    models = [tmp_path / "one", tmp_path / "two"]
    for n, model in enumerate(models):
        train_tokenizer(sentences[n::2], 300 + n).save(model)
    params = tokenize_params(encoding="data/start/base")
    counts = tokenize(raw, tmp_path / "tokens", params, fifths.fractions, SEED, models[0])
    assert counts["vocab_size"] == 300
    ranks = (tmp_path / "tokens/tokenizer/ranks.tiktoken").read_bytes()
    assert ranks == (models[0] / "ranks.tiktoken").read_bytes()
    keys = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            encode, "new_folder", lambda *arguments: keys.append(arguments[2]) or new_folder(*arguments)
        )
        for model in (*models, None):
            section = params if model else trained
            tokenize(raw, tmp_path / "tokens", section, fifths.fractions, SEED, model)
    assert len(set(keys)) == 3


def test_a_model_of_another_project_has_no_tokens_to_use(
    tmp_path: Path, corpus: Corpus, sentences: list[str], fifths: SplitParams
) -> None:
    raw, model = corpus(sentences), tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    params = tokenize_params(encoding="data/start/model")
    with pytest.raises(ConfigError, match=r"data/start/model has no ranks\.tiktoken, .*; name the encoding"):
        tokenize(raw, tmp_path / "tokens", params, fifths.fractions, SEED, model)

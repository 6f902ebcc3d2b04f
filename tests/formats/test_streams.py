"""Stage split and its streams: whole documents on each side, correct offsets, memory-mapped tokens."""

import io
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from sections import side_of, split_params

from gptpipe.base.manifest import read_manifest, verify
from gptpipe.collect import shards
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.formats import streams
from gptpipe.formats.corpus import id_of
from gptpipe.formats.sides import SIDES
from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.shell.errors import InputError, IntegrityError
from gptpipe.split import split as stage
from gptpipe.split.params import SplitParams
from gptpipe.split.split import split
from gptpipe.tokenize.encode import tokenize
from gptpipe.tokenize.params import TokenizeParams

SEED = 7


@pytest.fixture
def tokens(
    tmp_path: Path,
    corpus: Callable[[Iterable[str]], Path],
    sentences: list[str],
    trained: TokenizeParams,
    fifths: SplitParams,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder data/tokens with several shards."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    tokenize(corpus(sentences), tmp_path / "tokens", trained, fifths.fractions, SEED)
    return tmp_path / "tokens"


def test_each_side_has_its_documents_in_the_order_of_the_corpus(
    tmp_path: Path, tokens: Path, sentences: list[str], fifths: SplitParams
) -> None:
    counts = split(tokens, tmp_path / "split", fifths, SEED)
    tokenizer = Tokenizer.load(tmp_path / "split" / "tokenizer")
    for side in SIDES:
        texts = [text for text in sentences if side_of(id_of(text.encode()), fifths, SEED) == side]
        stream = np.load(tmp_path / "split" / side / "tokens.npy", mmap_mode="r")
        assert isinstance(stream, np.memmap)
        assert (stream.dtype, stream.shape) == (np.uint16, (counts[f"{side}_tokens"],))
        table = pd.read_parquet(tmp_path / "split" / side / "documents.parquet")
        assert list(table.columns) == ["id", "source", "offset", "n_tokens", "n_bytes"]
        assert list(table["id"]) == [id_of(text.encode()) for text in texts]
        assert set(table["source"]) == {"text"}
        assert list(table["n_bytes"]) == [len(text.encode()) for text in texts]
        assert table["offset"].iloc[0] == 0
        assert table["n_tokens"].sum() == len(stream)
        for text, offset, n_tokens in zip(texts, table["offset"], table["n_tokens"], strict=True):
            document = stream[offset : offset + n_tokens]
            assert tokenizer.decode(document[:-1].tolist()) == text
            assert document[-1] == tokenizer.end_of_text
            assert tokenizer.end_of_text not in document[:-1]
        assert counts[f"{side}_documents"] == len(texts)
        assert counts[f"{side}_bytes"] == sum(len(text.encode()) for text in texts)
    manifest = verify(tmp_path / "split")
    assert manifest.counts == counts
    assert manifest.made_from["tokens"] == verify(tokens).digest
    assert manifest.made_from["raw"] == verify(tmp_path / "raw").digest
    assert str(tmp_path / "corpus.txt") in manifest.made_from  # back to the sources


def test_no_document_and_no_window_is_on_two_sides(tmp_path: Path, tokens: Path, fifths: SplitParams) -> None:
    split(tokens, tmp_path / "split", fifths, SEED)
    opened = {side: open_stream(tmp_path / "split", side) for side in SIDES}
    ids = [document_id for stream in opened.values() for document_id in stream.documents["id"]]
    assert len(ids) == len(set(ids)) == 300
    length = 32
    windows = {
        side: {stream.tokens[i : i + length].tobytes() for i in range(len(stream.tokens) - length + 1)}
        for side, stream in opened.items()
    }
    assert min(map(len, windows.values())) > 1000
    for side, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert windows[side].isdisjoint(windows[other])


@pytest.mark.parametrize("dedup", ["none", "exact", "near"])
def test_equal_and_nearly_equal_documents_are_never_on_two_sides(
    tmp_path: Path,
    sentences: list[str],
    trained: TokenizeParams,
    fifths: SplitParams,
    dedup: str,
    collect_params: Callable[..., CollectParams],
) -> None:
    """Nearly equal ones if dedup is near; equal ones always, because their ids are equal."""
    pytest.importorskip("rensa")
    almost = [f"{text} more" for text in sentences] if dedup == "near" else []
    (tmp_path / "a.txt").write_text("\n".join([*sentences, *almost, *sentences]))
    source = {"kind": "text", "paths": (f"{tmp_path}/a.txt",), "document": "line"}
    counts = collect(collect_params(source, dedup=dedup), tmp_path / "raw")
    assert counts["documents"] == (600 if dedup == "none" else 300)
    tokenize(tmp_path / "raw", tmp_path / "tokens", trained, fifths.fractions, SEED)
    split(tmp_path / "tokens", tmp_path / "split", fifths, SEED)
    tokenizer = Tokenizer.load(tmp_path / "split/tokenizer")
    texts_of_sides = []
    for side in SIDES:
        stream = open_stream(tmp_path / "split", side)
        documents = np.split(stream.tokens, stream.documents["offset"])
        texts_of_sides.append(
            {tokenizer.decode(tokens.tolist()[:-1]).removesuffix(" more") for tokens in documents[1:]}
        )
    assert sum(map(len, texts_of_sides)) == len(set().union(*texts_of_sides)) == 300


def test_test_fraction_zero_gives_an_empty_test_stream(tmp_path: Path, tokens: Path) -> None:
    counts = split(tokens, tmp_path / "split", split_params(val_fraction=0.1, test_fraction=0.0), SEED)
    assert counts["test_documents"] == counts["test_tokens"] == 0
    assert 15 <= counts["val_documents"] <= 45
    empty = open_stream(tmp_path / "split", "test")
    assert empty.tokens.shape == (0,)
    assert len(empty.documents) == empty.n_bytes == 0
    assert np.load(tmp_path / "split" / "test" / "tokens.npy", mmap_mode="r").dtype == np.uint16


def test_splitting_twice_gives_the_same_bytes(tmp_path: Path, tokens: Path, fifths: SplitParams) -> None:
    for name in ("one", "two"):
        split(tokens, tmp_path / name, fifths, SEED)
    assert verify(tmp_path / "one").digest == verify(tmp_path / "two").digest
    split(tokens, tmp_path / "two", fifths, SEED + 1)
    assert verify(tmp_path / "one").digest != verify(tmp_path / "two").digest


def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, tokens: Path, fifths: SplitParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers write the shards in any order, each at its place. Nothing else is left in the folder."""
    split(tokens, tmp_path / "here", fifths, SEED)
    monkeypatch.setattr(stage, "_SMALL_BYTES", 0)
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    split(tokens, tmp_path / "workers", fifths, SEED)
    assert verify(tmp_path / "here").digest == verify(tmp_path / "workers").digest
    files = {path.relative_to(tmp_path / "workers").as_posix() for path in (tmp_path / "workers").rglob("*.*")}
    streams_of_sides = {f"{side}/{name}" for side in SIDES for name in ("documents.parquet", "tokens.npy")}
    assert files == {"manifest.json", "tokenizer/encoding.json", "tokenizer/ranks.tiktoken", *streams_of_sides}


def test_a_shard_whose_lengths_are_wrong_is_an_integrity_error(
    tmp_path: Path, tokens: Path, fifths: SplitParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens would overwrite those of the next shard."""
    shard = tokens / "tokens-00001.parquet"
    table = pq.read_table(shard)
    wrong = pa.array(table["n_tokens"].to_numpy() - 1)
    pq.write_table(table.set_column(table.column_names.index("n_tokens"), "n_tokens", wrong), shard)
    monkeypatch.setattr(stage, "verify_tokens", read_manifest)  # which would notice it first
    with pytest.raises(
        IntegrityError, match=r"tokens-00001\.parquet: 3,128 tokens instead of 3,097; make the folder"
    ):
        split(tokens, tmp_path / "split", fifths, SEED)
    assert not (tmp_path / "split").exists()


def test_an_empty_side_with_a_fraction_above_zero_is_an_input_error(tmp_path: Path, tokens: Path) -> None:
    with pytest.raises(InputError, match=r"test has no document \(documents: train \d+, val \d+, test 0\)"):
        split(tokens, tmp_path / "split", split_params(val_fraction=0.1, test_fraction=1e-9), SEED)
    assert not (tmp_path / "split").exists()


def test_a_stream_knows_its_bytes(tmp_path: Path, tokens: Path, fifths: SplitParams) -> None:
    counts = split(tokens, tmp_path / "split", fifths, SEED)
    stream = open_stream(tmp_path / "split", "val")
    assert stream.n_bytes == counts["val_bytes"]
    assert not stream.tokens.flags.writeable


def test_damaged_tokens_are_an_integrity_error(tmp_path: Path, tokens: Path, fifths: SplitParams) -> None:
    shards_ = sorted(tokens.glob("tokens-*.parquet"))
    assert len(shards_) >= 3
    first, second = shards_[0].read_bytes(), shards_[1].read_bytes()
    shards_[0].write_bytes(second)
    shards_[1].write_bytes(first)
    with pytest.raises(IntegrityError, match=r"tokens-00000\.parquet: differs from its manifest"):
        split(tokens, tmp_path / "split", fifths, SEED)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(description: str) -> bytes:
    """The header of an .npy file, and four tokens."""
    text = description.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)


HOSTILE_TOKENS: dict[str, bytes] = {
    "floats": npy(np.zeros(4)),
    "signed": npy(np.zeros(4, np.int16)),
    "bytes": npy(np.zeros(8, np.uint8)),
    "another byte order": npy(np.zeros(4, ">u2")),
    "two dimensions": npy(np.zeros((2, 2), np.uint16)),
    "no dimension": npy(np.array(4, np.uint16)),
    "fields": npy(np.zeros(2, [("a", "<u2"), ("b", "<u2")])),
    "too short": npy(np.zeros(4, np.uint16))[:-2],
    "too long": npy(np.zeros(4, np.uint16)) + b"ab",
    "a version of the future": npy(np.zeros(4, np.uint16)).replace(b"NUMPY\x01", b"NUMPY\x09"),
    "a huge shape": npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000,), }"),
    "a negative shape": npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (-4,), }"),
    "a shape of 2^70": npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**70},), }}"),
    "Fortran's order": npy_header("{'descr': '<u2', 'fortran_order': True, 'shape': (4,), }"),
    "objects": npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
    "deep": npy_header("(" * 110),
    "an expression": npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (2**62,), }"),
}


@pytest.fixture(scope="module")
def toy_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_split(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("name", HOSTILE_TOKENS)
def test_a_token_file_that_split_cannot_have_written_is_an_integrity_error(
    tmp_path: Path, toy_split: Path, name: str
) -> None:
    shutil.copytree(toy_split / "val", tmp_path / "val")
    (tmp_path / "val/tokens.npy").write_bytes(HOSTILE_TOKENS[name])
    with pytest.raises(IntegrityError, match=r"val/tokens\.npy: not a token stream") as caught:
        open_stream(tmp_path, "val")
    assert "\n" not in str(caught.value)


HOSTILE_DOCUMENTS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "a document less": lambda table: table[:-1],
    "a document twice": lambda table: pd.concat([table, table[-1:]]),
    "no document": lambda table: table[:0],
    "another order": lambda table: table[::-1],
    "an offset too far": lambda table: table.assign(offset=table["offset"] + 1),
    "negative lengths": lambda table: table.assign(n_tokens=-table["n_tokens"]),
    "lengths of nothing": lambda table: table.assign(n_tokens=0),
    "lengths of 2^62": lambda table: table.assign(n_tokens=1 << 62),
    "negative bytes": lambda table: table.assign(n_bytes=-1),
    "bytes beyond 2^31": lambda table: table.assign(n_bytes=1 << 62),
    "missing offsets": lambda table: table.assign(offset=pd.array([None] * len(table), "Int64")),
    "missing ids": lambda table: table.assign(id=pd.array([None] * len(table), "string")),
    "offsets as text": lambda table: table.assign(offset=table["offset"].astype(str)),
    "fractions": lambda table: table.assign(n_tokens=table["n_tokens"].astype(float)),
    "no sources": lambda table: table.drop(columns="source"),
    "ids as numbers": lambda table: table.assign(id=1),
}


@pytest.mark.parametrize("name", HOSTILE_DOCUMENTS)
def test_documents_that_do_not_fit_the_tokens_are_an_integrity_error(
    tmp_path: Path, toy_split: Path, name: str
) -> None:
    shutil.copytree(toy_split / "val", tmp_path / "val")
    path = tmp_path / "val/documents.parquet"
    HOSTILE_DOCUMENTS[name](pd.read_parquet(path)).to_parquet(path, index=False)
    with pytest.raises(IntegrityError, match=r"val/documents\.parquet: ") as caught:
        open_stream(tmp_path, "val")
    assert "\n" not in str(caught.value)


def test_a_token_beyond_the_vocabulary_is_an_integrity_error(
    tmp_path: Path, toy_split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last part of the stream, too; the token would be an index beyond the embedding."""
    monkeypatch.setattr(streams, "_CHECKED_TOKENS", 100)
    shutil.copytree(toy_split / "val", tmp_path / "val")
    tokens = np.load(tmp_path / "val/tokens.npy")
    assert len(open_stream(tmp_path, "val", 300).tokens) == len(tokens)
    tokens[-2] = 300
    np.save(tmp_path / "val/tokens.npy", tokens)
    with pytest.raises(IntegrityError, match="it contains token 300, the tokenizer has 300 tokens"):
        open_stream(tmp_path, "val", 300)


@pytest.mark.parametrize("kind", ["empty", "truncated", "pickle", "missing", "no table"])
def test_a_damaged_or_missing_stream_is_an_integrity_error(
    tmp_path: Path, tokens: Path, fifths: SplitParams, kind: str
) -> None:
    split(tokens, tmp_path / "split", fifths, SEED)
    path = tmp_path / "split" / "val" / "tokens.npy"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "pickle":
        np.save(path, np.array([{"an": "object"}], dtype=object))
    elif kind == "missing":
        path.unlink()
    else:
        (tmp_path / "split" / "val" / "documents.parquet").unlink()
    with pytest.raises(IntegrityError, match=r"val/(tokens\.npy|documents\.parquet): "):
        open_stream(tmp_path / "split", "val")
    with pytest.raises(IntegrityError):
        verify(tmp_path / "split")

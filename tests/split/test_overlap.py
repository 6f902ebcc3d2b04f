"""Overlap of held-out text with train, compared with plain sets of words."""

import json
import random
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sections import side_of, split_params

from gptpipe.collect import batch as shards
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.formats.corpus import id_of
from gptpipe.formats.sides import Side
from gptpipe.shell.errors import InputError
from gptpipe.split import overlap
from gptpipe.split.overlap import report_contamination

SEED = 7
FIFTHS: dict[str, Any] = {"val_fraction": 0.2, "test_fraction": 0.2}
RUN = [f"w{i}" for i in range(13)]


@pytest.fixture
def report_on(tmp_path: Path, collect_params: Callable[..., CollectParams]) -> Callable[..., dict[str, Any]]:
    """Collect texts, and return the report about them."""

    def run(texts: list[str], **changed: Any) -> dict[str, Any]:
        (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        params = collect_params({"kind": "jsonl", "paths": (f"{tmp_path}/corpus.jsonl",)})
        collect(params, tmp_path / "raw")
        split = split_params(**{**FIFTHS, **changed})
        report_contamination(tmp_path / "raw", tmp_path / "split.json", split, params, SEED)
        return json.loads((tmp_path / "split.json").read_text())

    return run


def on_side(side: Side, words: list[str]) -> str:
    """A text that is on the given side: these words and a last word that is chosen for it."""
    texts = (" ".join([*words, f"end{i}"]) for i in count())
    return next(text for text in texts if side_of(id_of(text.encode()), split_params(**FIFTHS), SEED) == side)


def test_counts_equal_those_of_plain_sets_of_words(
    report_on: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts with punctuation and letters of several scripts, some empty; several shards and blocks, two workers."""
    random_ = random.Random(0)
    words = ["The", "cat", "it's", "naïve", "Straße", "漢字", "x_1", "42", "“dog”", "dog", "กี", "กู", "...", "-"]
    texts = [
        random_.choice((" ", "\n", ", ")).join(random_.choices(words, k=random_.randrange(30))) + f" {i}"
        for i in range(300)
    ]
    monkeypatch.setattr(shards, "SHARD_BYTES", 9_000)
    monkeypatch.setattr(overlap, "_BLOCK_CHARACTERS", 500)
    expected: dict[str, set[tuple[str, ...]]] = {}
    sides = {id_of(text.encode()): side_of(id_of(text.encode()), split_params(**FIFTHS), SEED) for text in texts}
    ngrams: dict[str, set[tuple[str, ...]]] = {}
    for text in texts:
        words_of_text = re.findall(r"[\u0e00-\u0eff\u4e00-\u9fff]|[^\W\u0e00-\u0eff\u4e00-\u9fff]+", text.lower())
        ngrams[id_of(text.encode())] = {tuple(words_of_text[i : i + 6]) for i in range(len(words_of_text) - 5)}
        expected.setdefault(sides[id_of(text.encode())], set()).update(ngrams[id_of(text.encode())])
    held_out = expected["val"] | expected["test"]
    one_worker = report_on(texts, ngram=6)
    for side in ("train", "val", "test"):
        others = held_out if side == "train" else expected["train"]
        of_side = [document_id for document_id, on in sides.items() if on == side]
        contaminated = [document_id for document_id in of_side if ngrams[document_id] & others]
        assert 3 < len(contaminated) < len(of_side) - 3
        assert one_worker[f"{side}_documents"] == len(of_side)
        assert one_worker[f"{side}_examined"] == sum(bool(ngrams[document_id]) for document_id in of_side)
        assert one_worker[f"{side}_contaminated"] == len(contaminated)
        assert one_worker["share"][side] == len(contaminated) / one_worker[f"{side}_examined"]
        assert side == "train" or one_worker["ids"][side] == contaminated[:20]
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    assert report_on(texts, ngram=6) == one_worker


def test_thirteen_shared_words_overlap_in_any_case_and_twelve_do_not(report_on: Callable[..., dict[str, Any]]) -> None:
    loud = [word.upper() + "," for word in RUN]
    train, val, test = on_side("train", ["a", *RUN]), on_side("val", [*loud]), on_side("test", ["b", *RUN[:12]])
    report = report_on([train, val, test])
    assert {name: report[name] for name in sorted(report) if name.endswith("_examined")} == {
        "test_examined": 1,
        "train_examined": 1,
        "val_examined": 1,
    }
    assert report["share"] == {"test": 0.0, "train": 1.0, "val": 1.0}
    assert report["ids"] == {"val": [id_of(val.encode())]}
    assert report_on([train, val, test], ngram=12)["share"] == {"test": 1.0, "train": 1.0, "val": 1.0}


def test_a_run_of_words_ends_with_its_document(report_on: Callable[..., dict[str, Any]]) -> None:
    halves = [on_side("train", RUN[:7]).removesuffix(" end0"), on_side("train", RUN[7:])]
    assert report_on([*halves, on_side("val", RUN)])["share"] == {"train": 0.0, "val": 0.0}


def test_benchmarks_are_examined_and_a_share_above_the_limit_is_an_error(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]]
) -> None:
    questions = [" ".join(RUN), "too short to say", " ".join(f"other{i}" for i in range(20))]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in questions))
    benchmark = {"kind": "jsonl", "paths": (f"{tmp_path}/questions.jsonl",), "text_key": "q"}
    texts = [on_side("train", ["a", *RUN]), on_side("val", [f"v{i}" for i in range(20)])]
    report = report_on(texts, benchmarks=(benchmark,), max_contamination=0.5)
    assert (report["benchmark-0_documents"], report["benchmark-0_examined"]) == (3, 2)
    assert report["share"] == {"benchmark-0": 0.5, "train": 1.0, "val": 0.0}
    assert report["ids"] == {"benchmark-0": ["number 1"]}
    with pytest.raises(InputError) as caught:
        report_on(texts, benchmarks=(benchmark,), max_contamination=0.49)
    assert str(caught.value) == (
        "split: 1 of 2 examined documents of benchmark-0 (50.00%) share 13 words in a row with train, above "
        "split.max_contamination; remove them, or raise the limit; the first 1 are: number 1"
    )
    assert json.loads((tmp_path / "split.json").read_text()) == report


def test_a_sample_of_whole_documents_is_examined_if_there_is_much_text(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling n-grams once missed documents that share a single run, so the shares fell with the sample."""
    runs = [[f"r{i}w{j}" for j in range(13)] for i in range(100)]
    held_out = [on_side("val", [f"a{i}w{j}" for j in range(20)] + runs[i // 2] * (i % 2)) for i in range(200)]
    texts = [*(on_side("train", [f"t{i}", *run]) for i, run in enumerate(runs)), *held_out]
    complete = report_on(texts)
    assert (complete["every_nth"], complete["val_examined"], complete["share"]["val"]) == (1, 200, 0.5)
    contaminated = {id_of(text.encode()) for text in held_out[1::2]}
    monkeypatch.setattr(overlap, "_MAX_NGRAMS", 900)
    report = report_on(texts)
    assert (report["every_nth"], report["val_documents"]) == (4, 200)
    assert 30 < report["val_examined"] < 70
    assert 0.35 < report["share"]["val"] < 0.65
    assert set(report["ids"]["val"]) <= contaminated
    with pytest.raises(InputError, match=r"of val \(\d\d\.\d\d%\) share 13 words in a row"):
        report_on(texts, max_contamination=0.35)


def test_without_held_out_documents_no_train_document_is_contaminated(report_on: Callable[..., dict[str, Any]]) -> None:
    report = report_on([on_side("train", RUN)], val_fraction=0.2, test_fraction=0.0)
    assert report["share"] == {"train": 0.0}

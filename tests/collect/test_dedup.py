"""Deduplication: `Seen`, and near-duplicates, of which one document in each cluster is kept."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gptpipe.collect.batch import Batch, rows_of_shards
from gptpipe.collect.dedup import near_duplicates

from gptpipe.base.manifest import verify
from gptpipe.collect import batch as shards
from gptpipe.collect import dedup
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.formats.corpus import SCHEMA, id_of, shard_path, shard_paths, write_shard

MakeParams = Callable[..., CollectParams]


def words(n: int, seed: int) -> list[str]:
    random_ = random.Random(seed)
    return ["".join(random_.choices("abcdefghijklmnop", k=random_.randrange(2, 9))) for _ in range(n)]


def with_changes(text: list[str], *positions: int) -> list[str]:
    return ["changed" if i in positions else word for i, word in enumerate(text)]


def jaccard(one: list[str], other: list[str]) -> float:
    """The independent reference: sets of five words."""
    sets = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def repeats(folder: Path, texts: list[str], similarity: float = 0.7) -> list[bool]:
    values = [
        {"id": id_of(text.encode()), "source": "text", "text": text, "n_bytes": len(text.encode())} for text in texts
    ]
    batch = Batch("text", 0, texts, pa.RecordBatch.from_pylist(values, SCHEMA), np.arange(len(texts)), {})
    for number, (rows, _) in enumerate(rows_of_shards([batch])):
        write_shard(shard_path(folder, number), rows)
    return near_duplicates(shard_paths(folder), similarity, folder / "signatures").tolist()


def test_seen_ids_are_found_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is a set of complete ids; some begin or end with zeros."""
    monkeypatch.setattr(dedup, "_MAX_RECENT", 50)
    random_, seen, reference = random.Random(0), dedup.Seen(), set[str]()
    ids = [f"{random_.choice(('00' * 6, 'ff' * 6))}{random_.randrange(900):04x}{'0' * 48}" for _ in range(2000)]
    ids += [f"{i:02x}{'00' * 31}" for i in range(100)] * 2
    for start in range(0, len(ids), 37):
        some = ids[start : start + 37]
        expected = [id_ in reference or id_ in some[:i] for i, id_ in enumerate(some)]
        assert seen.add(some).tolist() == expected
        reference.update(some)
    assert len(reference) > 1000
    seen.forget(ids[-1:])
    fresh = "ab" * 32
    assert seen.add([fresh, fresh]).tolist() == [False, True]
    seen.forget([fresh])
    assert seen.add([fresh]).tolist() == [False]


def test_near_duplicates_are_those_above_the_similarity(tmp_path: Path) -> None:
    base = words(200, seed=0)
    close = with_changes(base, 50)
    middle = with_changes(base, 20, 80, 140)
    far = with_changes(base, *range(0, 200, 8))
    assert [round(jaccard(base, text), 2) for text in (close, middle, far)] == [0.95, 0.86, 0.24]
    texts = [" ".join(text) for text in (base, words(200, seed=1), far, close, middle)]
    assert repeats(tmp_path / "a", texts) == [False, False, False, True, True]
    assert repeats(tmp_path / "b", texts, similarity=0.99) == [False] * 5


def test_letter_case_and_punctuation_make_no_difference(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog, and again."
    assert repeats(tmp_path / "a", [text, text.upper().replace(",", " --"), "?!", "...", "?!"]) == [
        False,
        True,
        False,
        False,
        True,
    ]


def test_scripts_without_spaces_have_shingles_too(tmp_path: Path) -> None:
    one = "日本語の文章には単語の間に空白がありませんので文字ごとに比べることにしました。" * 2
    assert repeats(tmp_path / "a", [one, one.replace("比べる", "比較する"), one[::-1]], 0.5) == [False, True, False]


def test_two_documents_similar_to_a_third_are_in_one_cluster(tmp_path: Path) -> None:
    """A and C are far apart; B, the last one, is close to both. Only one of the three is kept."""
    base = words(200, seed=1)
    a, b, c = with_changes(base, 10, 30, 50), base, with_changes(base, 110, 130, 150)
    assert jaccard(a, c) < 0.75 < 0.8 < jaccard(a, b)
    texts = [" ".join(text) for text in (a, c, b)]
    assert repeats(tmp_path / "two", texts[:2], 0.8) == [False, False]
    assert repeats(tmp_path / "all", texts, 0.8) == [False, True, True]


def test_thousands_of_pairs_against_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several shards and chunks: pairs above 0.8 are found, different documents are kept."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 300_000)
    monkeypatch.setattr(dedup, "_ROWS", 300)
    bases = [words(120, seed=i) for i in range(1000)]
    twins = [with_changes(base, 5 * (i % 20), 60) for i, base in enumerate(bases)]
    assert min(jaccard(*pair) for pair in zip(bases, twins, strict=True)) > 0.8
    is_duplicate = repeats(tmp_path / "a", [" ".join(text) for text in bases + twins])
    assert len(shard_paths(tmp_path / "a")) > 3
    assert not any(is_duplicate[:1000])
    assert sum(is_duplicate[1000:]) >= 995


def test_collect_counts_them_and_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 5_000)
    lines = [" ".join(words(60, seed=i)) for i in range(30)]
    for name, texts in (("a.txt", lines), ("b.txt", [f"{line} more" for line in lines[:10]] + lines[:5])):
        (tmp_path / name).write_text("\n".join(texts))
    sources = [{"kind": "text", "paths": (f"{tmp_path}/{name}.txt",), "document": "line"} for name in "ab"]
    params = collect_params(*sources, dedup="near")
    for workers in ("1", "2"):
        monkeypatch.setenv("GPTPIPE_WORKERS", workers)
        counts = collect(params, tmp_path / workers)
    assert (counts["documents_in"], counts["documents"]) == (45, 30)
    assert (counts["rejected_duplicate"], counts["rejected_near_duplicate"]) == (5, 10)
    assert counts["bytes"] == sum(len(line) for line in lines)
    kept = [text for shard in shard_paths(tmp_path / "1") for text in pq.read_table(shard)["text"].to_pylist()]
    assert kept == lines
    assert verify(tmp_path / "1").digest == verify(tmp_path / "2").digest
    assert {path.name for path in (tmp_path / "1").iterdir()} == {
        "manifest.json",
        *(f"docs-{i:05d}.parquet" for i in range(len(shard_paths(tmp_path / "1")))),
    }


def test_operators_and_brackets_are_compared_too(tmp_path: Path) -> None:
    """Three different functions were once merged into one, because they have the same words."""
    functions = [
        f"def f(a, b):\n    return a {one} b if a {two} b else a {three} b\n"
        for one, two, three in ("+>-", "-<+", "*>/")
    ]
    formulas = ["x = (a + b) * c ≤ d", "x = a + (b * c) ≤ d", "x = (a + b) * c ≥ d", "x = (a + b) ∩ c ≤ d"]
    assert repeats(tmp_path / "functions", functions) == [False] * 3
    assert repeats(tmp_path / "formulas", formulas) == [False] * 4
    assert repeats(tmp_path / "spaces", [functions[0], functions[0].replace(" ", "  ").replace("a, b", "a,b")]) == [
        False,
        True,
    ]


def test_prose_with_other_punctuation_is_a_duplicate(tmp_path: Path) -> None:
    text = (
        'The stage reads the corpus; it writes "shards" - one for each file. Does it stop? No! It goes on, slowly, '
        "until all files (there may be thousands) are done: well-known tools do the same..."
    )
    other = text.translate({ord(old): new for old, new in {'"': "'", ";": ",", ":": " —", "!": ".", "?": "!"}.items()})
    assert repeats(tmp_path / "a", [text, other.replace(" - ", " -- ").replace("...", ".")]) == [False, True]


def test_marks_belong_to_their_letters(tmp_path: Path) -> None:
    """The letters of the two texts are the same; their vowels differ."""
    one = "कि की कु कू के कै को कौ कं कः खि खी खु खू खे खै"
    other = "कौ को कै के कू कु की कि खै खे खू खु खी खि कः कं"
    assert repeats(tmp_path / "a", [one, other]) == [False, False]

"""Near-duplicates, of which one document in each cluster is kept."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptpipe.base.manifest import verify
from gptpipe.collect import collect as collecting
from gptpipe.collect import near_duplicates as near
from gptpipe.collect import parts, shards
from gptpipe.collect.collect import collect
from gptpipe.collect.near_duplicates import SignatureWriter, SignedPart, near_duplicates
from gptpipe.collect.params import CollectParams
from gptpipe.collect.words import split_words
from gptpipe.formats.corpus import shard_paths

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


def signed(folder: Path, texts: list[str]) -> SignedPart:
    writer = SignatureWriter(folder)
    writer.add(pa.array(texts, pa.string()))
    writer.close()
    return SignedPart(folder, np.ones(len(texts), np.bool_))


def repeats(
    folder: Path, texts: list[str], similarity: float = 0.7, n_parts: int = 1, is_small: bool = True
) -> list[bool]:
    """Whether each text is a duplicate of an earlier one; the texts are divided into parts of equal length."""
    size = -(-len(texts) // n_parts)
    parts_of_texts = [signed(folder / f"{i}", texts[i : i + size]) for i in range(0, len(texts), size)]
    masks = near_duplicates(parts_of_texts, similarity, folder / "clusters", is_small)
    return np.concatenate(masks).tolist()


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
    texts = [one, one.replace("比べる", "比較する"), one[::-1]]
    assert repeats(tmp_path / "a", texts, 0.5) == [False, True, False]


def test_two_documents_similar_to_a_third_are_in_one_cluster(tmp_path: Path) -> None:
    """A and C are far apart; B, the last one, is close to both. Only one of the three is kept."""
    base = words(200, seed=1)
    a, b, c = with_changes(base, 10, 30, 50), base, with_changes(base, 110, 130, 150)
    assert jaccard(a, c) < 0.75 < 0.8 < jaccard(a, b)
    texts = [" ".join(text) for text in (a, c, b)]
    assert repeats(tmp_path / "two", texts[:2], 0.8) == [False, False]
    assert repeats(tmp_path / "all", texts, 0.8) == [False, True, True]


@pytest.mark.parametrize("is_small", [True, False])
def test_thousands_of_pairs_against_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    """Over several parts, ranges of keys and comparisons: pairs above 0.8 are found, other documents kept."""
    monkeypatch.setattr(near, "_SORTED", 300)
    monkeypatch.setattr(near, "_COMPARED", 50)
    monkeypatch.setenv("GPTPIPE_WORKERS", "1")  # in this process
    bases = [words(120, seed=i) for i in range(1000)]
    twins = [with_changes(base, 5 * (i % 20), 60) for i, base in enumerate(bases)]
    assert min(jaccard(*pair) for pair in zip(bases, twins, strict=True)) > 0.8
    is_duplicate = repeats(tmp_path, [" ".join(text) for text in bases + twins], n_parts=7, is_small=is_small)
    assert not (tmp_path / "clusters").exists()
    assert not any(is_duplicate[:1000])
    assert sum(is_duplicate[1000:]) >= 995


def test_documents_of_one_cluster_are_not_compared_again(tmp_path: Path) -> None:
    part = signed(tmp_path / "part", [" ".join(with_changes(words(60, seed=0), i)) for i in range(4)])
    clusters = tmp_path / "clusters"

    def pairs() -> set[tuple[int, int]]:
        find = partial(near._similar_pairs, parts=[part], similarity=0.7, clusters=clusters)
        return {pair for band in range(32) for pair in zip(*map(list, find((band, 0, 1))), strict=True)}

    def later_documents() -> set[int]:
        return {other for one, other in pairs() if one < other}

    assert later_documents() == {1, 2, 3}
    np.array([0, 0, 0, 3]).tofile(clusters)
    assert 3 in later_documents()
    np.array([0, 0, 0, 0]).tofile(clusters)
    assert pairs() == set()


def test_a_worker_pairs_each_document_once_with_the_first_of_its_cluster(tmp_path: Path) -> None:
    text = " ".join(words(60, seed=0))
    part = signed(tmp_path / "part", [" ".join(words(60, seed=1)), *[text] * 4])
    one, other = near._similar_pairs((0, 0, 1), parts=[part], similarity=0.7, clusters=tmp_path / "clusters")
    assert (one.tolist(), other.tolist()) == ([1, 1, 1], [2, 3, 4])


def test_parts_and_ranges_of_keys_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(with_changes(words(60, seed=i % 10), i % 7)) for i in range(60)]
    expected = repeats(tmp_path / "one", texts)
    assert 30 < sum(expected) < 60
    assert repeats(tmp_path / "five", texts, n_parts=5) == expected
    monkeypatch.setattr(near, "_SORTED", 8)
    monkeypatch.setattr(near, "_COMPARED", 3)
    assert repeats(tmp_path / "ranges", texts, n_parts=4) == expected


def test_only_kept_candidates_are_compared(tmp_path: Path) -> None:
    """The first text was rejected as an exact duplicate, so the second is the first of its cluster."""
    text = " ".join(words(50, seed=0))
    part = signed(tmp_path / "a", [text, f"{text} more", "other words than these", f"{text} again"])
    none = signed(tmp_path / "b", [])
    part.is_kept[0] = False
    masks = near_duplicates([none, part, none], 0.7, tmp_path / "clusters", is_small=True)
    assert [mask.tolist() for mask in masks] == [[], [False, False, False, True], []]
    part.is_kept[:] = False
    masks = near_duplicates([part, none], 0.7, tmp_path / "clusters", is_small=False)
    assert not any(mask.any() for mask in masks)


def test_collect_counts_them_and_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, collect_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 5_000)
    monkeypatch.setattr(parts, "PART_BYTES", 3_000)
    lines = [" ".join(words(60, seed=i)) for i in range(30)]
    for name, texts in (("a.txt", lines), ("b.txt", [f"{line} more" for line in lines[:10]] + lines[:5])):
        (tmp_path / name).write_text("\n".join(texts))
    sources = [{"kind": "text", "paths": (f"{tmp_path}/{name}.txt",), "document": "line"} for name in "ab"]
    params = collect_params(*sources, dedup="near")
    for workers in ("1", "2"):
        monkeypatch.setenv("GPTPIPE_WORKERS", workers)
        monkeypatch.setattr(collecting, "_MANY_BYTES", 0 if workers == "2" else 1 << 30)
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
    spaced = functions[0].replace(" ", "  ").replace("a, b", "a,b")
    assert repeats(tmp_path / "spaces", [functions[0], spaced]) == [False, True]


DIFFERENT = (  # texts that differ in marks that are both operators and punctuation
    ("i--; s += a[i];", "--i; s += a[i];", "i++; s += a[i];", "i; s += a[i];"),
    ("*p--", "*--p"),
    ("f(x) = 0", "f'(x) = 0", "f''(x) = 0", "f\u2032(x) = 0"),
    ("(u v)' = u' v + u v'", "(u v) = u' v + u v'"),
    ("go' xs ys", "go xs ys"),
    ("a ? b : c", "a, b : c", "a ?? b : c"),
    ("a?.b()", "a.b()", "a!.b()", "a!!.b()"),
    ("f()?;", "f();"),
    ("n! / k!", "n / k"),
    ("x := y", "x = y"),
    ("a::b", "a.b", "a..b"),
    ("A .* B", "A * B"),
    ("⌊x⌋", "⌈x⌉", "‖x‖", "x"),
    ("f $ g x", "f . g x"),
)
EQUAL = (  # texts that differ in spaces, quotation marks or punctuation of prose only
    ("a-b*c", "a - b * c", "a  -  b\n* c"),
    ("x=a?b:c;", "x = a ? b : c;"),
    ("for(;i-->0;){s+=f'(a[i]);}", "for ( ; i-- > 0 ; ) { s += f' ( a[i] ) ; }"),
    ("if(!x&&--y){n!/k!}", "if ( !x && --y ) { n! / k! }"),
    ("x:=a::b??c.*d", "x := a :: b ?? c .* d"),
    ("print('it', b'a b', r'')", 'print("it", b"a b", r"")'),
    ("Why? It's 'so'... No -- not so.", 'Why! It\'s "so", no — not so', "Why. It's so: no--not so!!"),
)


def words_and_signs(text: str) -> list[int]:
    hashes: list[int] = split_words([text], signs=True).hashes.tolist()
    return hashes


@pytest.mark.parametrize("texts", DIFFERENT)
def test_marks_are_compared_where_they_are_operators(texts: tuple[str, ...]) -> None:
    assert len({tuple(words_and_signs(text)) for text in texts}) == len(texts)


@pytest.mark.parametrize("texts", EQUAL)
def test_spaces_and_punctuation_of_prose_are_not_compared(texts: tuple[str, ...]) -> None:
    assert len({tuple(words_and_signs(text)) for text in texts}) == 1


@pytest.mark.parametrize("text", ["b'", " 'a", "'", "?", "ab?", "- ", "--", "f'", ". :"])
def test_telling_operators_from_punctuation_takes_linear_time(text: str) -> None:
    start = time.process_time()
    words_and_signs(text * 30_000)
    assert time.process_time() - start < 1  # takes 0.05; with a search to the end of the text for each mark 20


def test_prose_with_other_punctuation_is_a_duplicate(tmp_path: Path) -> None:
    text = (
        'The stage reads the corpus; it writes "shards" - one for each file. Does it stop? No! '
        "It goes on, slowly, until all files (there may be thousands) are done: "
        "well-known tools do the same..."
    )
    other = text.translate(
        {ord(old): new for old, new in {'"': "'", ";": ",", ":": " —", "!": ".", "?": "!"}.items()}
    )
    assert repeats(tmp_path / "a", [text, other.replace(" - ", " -- ").replace("...", ".")]) == [False, True]


def test_marks_belong_to_their_letters(tmp_path: Path) -> None:
    """The letters of the two texts are the same; their vowels differ."""
    one = "कि की कु कू के कै को कौ कं कः खि खी खु खू खे खै"
    other = "कौ को कै के कू कु की कि खै खे खू खु खी खि कः कं"
    assert repeats(tmp_path / "a", [one, other]) == [False, False]


def test_clusters_are_joined_through_their_first_documents() -> None:
    """Documents 3 and 0 are joined last: then 2 and 1, which are in the cluster of 3, follow."""
    first_of_cluster = np.arange(5)
    for one, other in ((2, 3), (1, 2), (0, 3)):
        near._unite(first_of_cluster, np.array([one]), np.array([other]))
    assert near._firsts(first_of_cluster, np.arange(5)).tolist() == [0, 0, 0, 0, 4]
    assert (first_of_cluster != np.arange(5)).tolist() == [False, True, True, True, False]

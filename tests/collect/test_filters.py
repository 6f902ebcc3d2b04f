"""Filters: values on both sides of each limit, removed lines, and reports/collect.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sections import filters

from gptpipe.collect.cleaning import Rejected, clean
from gptpipe.collect.collect import collect
from gptpipe.collect.filters import fault, without_boilerplate
from gptpipe.collect.params import CollectParams

# The filter, its setting, a text that just passes it, one that just does not, and what is said of that one.
TABLE: list[tuple[str, Any, str, str, str]] = [
    ("words", (3, 4), "a b c d", "a b c d e", "5, allowed is at most 4"),
    ("words", (3, 4), "a b c", "a b", "2, allowed is at least 3"),
    ("mean_word_length", (3, 10), "abc abc", "ab abc", "2.5, allowed is at least 3"),
    ("mean_word_length", (3, 4), "abc abcde", "abcd abcde", "4.5, allowed is at most 4"),
    ("symbols_per_word", 0.1, "# " + "a " * 9, "# # " + "a " * 9, "0.1818, allowed is at most 0.1"),
    ("symbols_per_word", 0.1, "a... b…" + " a" * 8, "a... b..." + " a" * 9, "0.1818, allowed is at most 0.1"),
    ("ellipsis_lines", 0.5, "a...\nb", "a...\nb\n\nc…", "0.6667, allowed is at most 0.5"),
    ("bullet_lines", 0.5, "- a\nb", "  - a\n• b\nc", "0.6667, allowed is at most 0.5"),
    ("alphabetic_words", 0.8, "a b c d 5", "a b c 4_ 5", "0.6, allowed is at least 0.8"),
    ("stop_words", 2, "The cat, (and) the dog", "the cat, the dog", "1, allowed is at least 2"),
    ("sentences", 3, 'One. "Two!" Three? No', "One.two. Three? No", "2, allowed is at least 3"),
    ("duplicate_lines", (0.3, 1), "a\nb\nc\na", "a\nb\na", "0.3333, allowed is at most 0.3"),
    (
        "duplicate_paragraphs",
        (0.3, 1),
        "a\nb\n\nc\n\nd\n\na\nb",
        "a\nb\n\nc\n\na\nb",
        "0.3333, allowed is at most 0.3",
    ),
]
CHARACTERS = [
    ("duplicate_lines", (1, 0.2), "ab\ncdefgh\nab", "abc\ncdefgh\nabc", 3 / 12),
    ("duplicate_paragraphs", (1, 0.2), "ab\n\ncdefgh\n\nab", "abc\n\ncdefgh\n\nabc", 3 / 12),
    # "ab cd" twice: 8 of 40 characters pass, 8 of 39 do not
    ("top_ngrams", (0.2, 1, 1), "ab cd x ab cd " + "y" * 31, "ab cd x ab cd " + "y" * 30, 8 / 39),
    ("top_ngrams", (1, 0.2, 1), "a b c x a b c " + "y" * 23, "a b c x a b c " + "y" * 22, 6 / 29),
    ("top_ngrams", (1, 1, 0.2), "a b c d x a b c d " + "y" * 31, "a b c d x a b c d " + "y" * 30, 8 / 39),
    *(
        (
            "duplicate_ngrams",
            tuple(0.2 if n == size else 1 for n in range(5, 11)),
            f"{run} x {run} {'y' * (3 * size - 1)}",
            f"{run} x {run} {'y' * (3 * size - 2)}",
            size / (5 * size - 1),
        )
        for size in range(5, 11)
        for run in [" ".join("abcdefghij"[:size])]
    ),
]


@pytest.mark.parametrize(("name", "setting", "good", "bad", "why"), TABLE)
def test_a_filter_rejects_values_beyond_its_limit(
    name: str, setting: Any, good: str, bad: str, why: str
) -> None:
    assert fault(good, filters(**{name: setting})) is None
    assert fault(bad, filters(**{name: setting})) == (name, why)
    assert fault(bad, filters()) is None


@pytest.mark.parametrize(
    "text",
    [
        "人人生而自由。他们有理性\uff01「是。」",
        "सब स्वतन्त्र हैं। सब समान हैं॥ हाँ।",
        "هل هذا صحيح؟ نعم. جيد؟",
        "ሰው ነው። ነጻ ነው፧ አዎ።",
        "មនុស្ស។ សេរី។ បាទ៕",
    ],
)
def test_sentences_end_in_other_scripts_too(text: str) -> None:
    assert fault(text, filters(sentences=3)) is None
    assert fault(text, filters(sentences=4)) == ("sentences", "3, allowed is at least 4")
    lines = f"{text}\nmenu\n「{text}」"
    kept, _ = without_boilerplate(lines, filters(drop_lines_unfinished=True))
    assert kept == lines.replace("menu\n", "")


@pytest.mark.parametrize(("name", "setting", "good", "bad", "value"), CHARACTERS)
def test_repetition_is_counted_in_characters(
    name: str, setting: Any, good: str, bad: str, value: float
) -> None:
    assert fault(good, filters(**{name: setting})) is None
    assert fault(bad, filters(**{name: setting})) == (name, f"{value:.4g}, allowed is at most 0.2")


def test_characters_in_overlapping_ngrams_count_once() -> None:
    """Twelve equal words contain seven repeats of the 5-gram, which cover eleven of the words."""
    most = filters(duplicate_ngrams=(0.9, 1, 1, 1, 1, 1))
    assert fault("a " * 12, most) == ("duplicate_ngrams", "0.9167, allowed is at most 0.9")


def test_an_ngram_that_occurs_once_is_no_top_ngram() -> None:
    assert fault("two words", filters(top_ngrams=(0, 0, 0))) is None


@pytest.mark.parametrize(("phrase", "is_in_text"), [("{", True), ("lorem IPSUM", True), ("javascript", False)])
def test_phrases_reject_a_document(phrase: str, is_in_text: bool) -> None:
    why = ("phrases", f"has {phrase!r}") if is_in_text else None
    assert fault("Lorem ipsum { dolor", filters(phrases=(phrase,))) == why


def test_boilerplate_lines_are_removed() -> None:
    text = (
        "Home\n\nA line of five words.\nFour words are few.\n\n\nWithout JavaScript this is all.\n\n"
        'He said "and so on"\nno'
    )
    for setting, kept in (
        (
            {"drop_lines_below": 5},
            'A line of five words.\n\nWithout JavaScript this is all.\n\nHe said "and so on"',
        ),
        (
            {"drop_lines_unfinished": True},
            "A line of five words.\nFour words are few.\n\nWithout JavaScript this is all.\n\n"
            'He said "and so on"',
        ),
        ({"drop_lines_with": ("javascript", "home", "line", "few")}, 'He said "and so on"\nno'),
    ):
        assert without_boilerplate(text, filters(**setting)) == (kept, None)
    assert without_boilerplate(text, filters(words=(1, 2))) == (text, None)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("drop_lines_unfinished", {"drop_lines_unfinished": True}),
        ("drop_lines_below", {"drop_lines_below": 3, "drop_lines_unfinished": True}),
        ("drop_lines_with", {"drop_lines_with": ("\u0e2d",), "drop_lines_unfinished": True}),
    ],
)
def test_a_filter_that_drops_the_last_line_is_the_reason(
    collect_params: Callable[..., CollectParams], name: str, setting: dict[str, Any]
) -> None:
    """Thai marks no sentence ends. Such texts were once `empty`, with advice about paths and separators."""
    thai = "\u0e2a\u0e2d\u0e07 \u0e1a\u0e23\u0e23\u0e17\u0e31\u0e14\n\u0e2d\u0e35\u0e01\n"
    assert clean([thai, "\n"], collect_params({"kind": "python-docs"}, filters=setting)) == [
        Rejected(name, "drops each line"),
        Rejected("empty"),
    ]


def test_filters_apply_after_boilerplate_is_removed(collect_params: Callable[..., CollectParams]) -> None:
    params = collect_params({"kind": "python-docs"}, filters={"drop_lines_below": 2, "words": (3, 9)})
    assert clean(["menu\nthree words here"], params) == ["three words here"]
    words, dropped = clean(["menu\ntwo words", "menu\nlogin"], params)
    assert isinstance(words, Rejected)
    assert isinstance(dropped, Rejected)
    assert (words.reason, dropped.reason) == ("words", "drop_lines_below")


def test_rejections_are_reported_by_source_with_examples(
    tmp_path: Path, collect_params: Callable[..., CollectParams]
) -> None:
    lines = [
        "a good line of words",
        "tiny",
        *(f"number {i}" for i in range(5)),
        "a good line of words",
        "x" * 999,
    ]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in [*lines, "\ud800|`x`"])
    )
    (tmp_path / "b.txt").write_text("one more good line\n\n")
    sources = [
        {"kind": "jsonl", "paths": (f"{tmp_path}/a.jsonl",)},
        {"kind": "text", "paths": (f"{tmp_path}/b.txt",)},
    ]
    params = collect_params(*sources, min_document_bytes=5, filters={"words": (3, 9)})
    for name in ("raw", "again"):
        counts = collect(params, tmp_path / name, tmp_path / f"{name}.md")
    assert counts["rejected_words"] == 6
    page = (tmp_path / "raw.md").read_text()
    assert page == (tmp_path / "again.md").read_text()
    assert (
        page
        == """\
# What stage collect kept, and what it left out

| source | kept | bytes | rejected |
|---|---|---|---|
| jsonl | 1 | 20 | duplicate 1, lone surrogates 1, too short 1, words 6 |
| text | 1 | 18 | none |

The first few of each reason, as they came in, shortened:

jsonl, **too short**: 4 bytes, allowed is at least 5

> tiny

jsonl, **words**: 2, allowed is at least 3

> number 0

jsonl, **words**: 2, allowed is at least 3

> number 1

jsonl, **words**: 2, allowed is at least 3

> number 2

jsonl, **lone surrogates**

> &#92;ud800&#124;&#96;x&#96;

jsonl, **duplicate**

> a good line of words
"""
    )


def test_near_duplicates_are_in_the_report(
    tmp_path: Path, collect_params: Callable[..., CollectParams]
) -> None:
    words = " ".join(f"word{i}" for i in range(100))
    (tmp_path / "a.txt").write_text(f"{words}\n{words} and more\n")
    source = {"kind": "text", "paths": (f"{tmp_path}/a.txt",), "document": "line"}
    collect(collect_params(source, dedup="near"), tmp_path / "raw", tmp_path / "raw.md")
    page = (tmp_path / "raw.md").read_text()
    assert f"| text | 1 | {len(words)} | near duplicate 1 |\n" in page
    assert f"text, **near duplicate**\n\n> {words[:200]}\n" in page

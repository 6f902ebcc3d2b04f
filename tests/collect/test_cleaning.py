"""Cleaning and cutting of single texts."""

import random
import unicodedata
from collections.abc import Callable

import pytest

from gptpipe.collect import cleaning
from gptpipe.collect.cleaning import Rejected, cut
from gptpipe.collect.params import CollectParams

MakeParams = Callable[..., CollectParams]


def clean(text: str, params: CollectParams, *, keep_trailing_spaces: bool = False) -> str | Rejected:
    """Clean one text alone."""
    (result,) = cleaning.clean([text], params, keep_trailing_spaces=keep_trailing_spaces)
    return result


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("plain text", "plain text"),
        ("\ufeffwith a byte order mark", "with a byte order mark"),
        ("one\r\ntwo\rthree\n", "one\ntwo\nthree"),
        ("space  \t\nat line ends \n", "space\nat line ends"),
        ("\n\n\nlines around\n\n", "lines around"),
        ("  indented\n    twice", "  indented\n    twice"),
        ("a\x00b\x07c\x7fd\x84e\tf", "abcde\tf"),
        ("title\x0bsubtitle\x0cnext page\x85next line", "title\nsubtitle\nnext page\nnext line"),
        ("file\x1cgroup\x1drecord\x1eunit\x1funit", "file\ngroup\nrecord\nunit unit"),
        ("\x0c\x1ftext \x0c\x85", " text"),
        ("line\u2028paragraph\u2029end", "line\u2028paragraph\u2029end"),
        ("e\u0301", "é"),
        ("e\x00\u0301", "é"),  # composed after the control character is gone
        ("inside\ufeff stays", "inside\ufeff stays"),
        ("<|endoftext|> is text", "<|endoftext|> is text"),
        ("a" + " " * 5000 + "b", "a" + " " * 1000 + "b"),
        ("a" + "\n" * 5000 + "b", "a" + "\n" * 1000 + "b"),
        ("a" + " " * 1000 + "b", "a" + " " * 1000 + "b"),
    ],
)
def test_clean(collect_params, raw: str, cleaned: str) -> None:
    params = collect_params({"kind": "python-docs"})
    assert clean(raw, params) == cleaned
    assert clean(cleaned, params) == cleaned


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "empty"),
        ("\ufeff", "empty"),
        (" \r\n\t\u00a0\n", "empty"),
        ("\x00\x01", "empty"),
        ("lone \ud800 surrogate", "lone_surrogates"),
        ("seven b", "too_short"),
        ("äöü", "too_short"),  # six bytes
    ],
)
def test_rejected(collect_params, raw: str, reason: str) -> None:
    result = clean(raw, collect_params({"kind": "python-docs"}, min_document_bytes=8))
    assert isinstance(result, Rejected)
    assert result.reason == reason


def test_the_shortest_document_is_measured_in_bytes(collect_params) -> None:
    assert clean("äöüß", collect_params({"kind": "python-docs"}, min_document_bytes=8)) == "äöüß"


def test_cleaning_takes_linear_time(collect_params) -> None:
    """A million spaces before a letter once kept a regular expression busy for hours."""
    params = collect_params({"kind": "python-docs"})
    assert len(clean(" " * 1_000_000 + "a", params)) == 1001
    assert len(clean((" " * 900 + "a") * 1000, params)) == 901_000


def test_cleaning_twice_changes_nothing(collect_params) -> None:
    params = collect_params({"kind": "python-docs"})
    random_ = random.Random(0)
    letters = "ab \t\n\r\x00\x0b\x1f\x85\ufeff\u0301\u0300é\u1100\u1161\U0001f600"
    for i in range(4000):
        keep = i % 2 == 0
        once = clean("".join(random_.choices(letters, k=12)), params, keep_trailing_spaces=keep)
        if isinstance(once, Rejected):
            continue
        assert unicodedata.is_normalized("NFC", once)
        if not once.startswith("\ufeff"):  # of several marks the first goes
            assert clean(once, params, keep_trailing_spaces=keep) == once


def test_trailing_spaces_can_be_kept(collect_params: MakeParams) -> None:
    """Two spaces at the end of a line are a line break in Markdown."""
    params = collect_params({"kind": "python-docs"})
    assert clean("one  \ntwo\t \n", params, keep_trailing_spaces=True) == "one  \ntwo\t "
    spaces = clean("a" + " " * 999 + "\n" + " " * 9, params, keep_trailing_spaces=True)
    assert spaces == "a" + " " * 999  # the 1,000th whitespace character was the line feed
    mixed = cleaning.clean(["a \n", "\ud800", "b\x00 "], params, keep_trailing_spaces=True)
    assert [mixed[0], mixed[2]] == ["a ", "b "]


def test_a_short_text_is_one_piece() -> None:
    assert cut("a" * 64, 64) == ["a" * 64]
    assert cut("", 64) == []


def test_pieces_end_on_character_boundaries() -> None:
    assert cut("€" * 50, 64) == ["€" * 21, "€" * 21, "€" * 8]  # 3 bytes each, 63 of 64 used
    assert cut("\U0001f600" * 33, 64) == ["\U0001f600" * 16, "\U0001f600" * 16, "\U0001f600"]


def test_pieces_end_after_a_line_in_their_second_half() -> None:
    assert cut("a" * 40 + "\n" + "b" * 60, 64) == ["a" * 40 + "\n", "b" * 60]
    assert cut("a" * 10 + "\n" + "b" * 60, 64) == ["a" * 10 + "\n" + "b" * 53, "b" * 7]


def test_pieces_join_to_the_text_and_keep_to_the_limit() -> None:
    random_ = random.Random(0)
    for _ in range(300):
        text = "".join(random_.choices("ab\n\u00e9\u20ac\U0001f600\ud800", k=random_.randrange(400)))
        pieces = cut(text, 64)
        assert "".join(pieces) == text
        assert all(0 < len(piece.encode(errors="surrogatepass")) <= 64 for piece in pieces)


def test_a_text_of_surrogates_is_cut() -> None:
    """Dropping characters without a UTF-8 form once made an empty piece, and an endless loop."""
    assert cut("\ud800" * 100, 64) == ["\ud800" * 21] * 4 + ["\ud800" * 16]


def test_runs_of_whitespace_are_limited_to_a_thousand_at_any_position(collect_params: MakeParams) -> None:
    params = collect_params({"kind": "python-docs"})
    for n in range(901, 1002):
        assert clean("a" * n + " " * 1001 + "b", params) == "a" * n + " " * 1000 + "b"


def test_runs_of_combining_marks_are_limited_to_a_thousand(collect_params: MakeParams) -> None:
    """NFC of a hundred thousand in a row takes ten seconds; a million would take a quarter of an hour."""
    some, many = "\u0316\u0303", "\u0316\u0300" * 50_000
    cleaned = clean(f"a{some}b e{many}f", collect_params({"kind": "python-docs"}))
    assert cleaned == "\u00e3\u0316b \u00e8" + "\u0316" * 500 + "\u0300" * 499 + "f"  # in the order of NFC


def test_control_characters_break_lines_or_are_removed(collect_params: MakeParams) -> None:
    params = collect_params({"kind": "python-docs"})
    for n, end in ((128, ""), (160, "é")):
        raw = "x".join(map(chr, range(n)))
        breaks = dict.fromkeys("\n\r\x0b\x0c\x1c\x1d\x1e\x85", "\n") | {"\t": "\t", "\x1f": " "}
        kept = [breaks.get(char, char if char.isprintable() else "") for char in map(chr, range(n))]
        assert clean(f"a{raw}{end}", params) == f"a{'x'.join(kept)}{end}"


def test_texts_cleaned_together_do_not_affect_each_other(collect_params: MakeParams) -> None:
    """Each becomes what it becomes when it is cleaned alone, for any characters at its ends."""
    params = collect_params({"kind": "python-docs"}, min_document_bytes=3)
    random_ = random.Random(0)
    letters = "ab \t\n\r\x00\x01\x85\ufeff\u0301\u0300é\u1100\u1161\U0001f600\u00a0"
    for alphabet in (letters, letters.replace("\x00", ""), "ab \t\n\r\x07", letters + "\ud800"):
        texts = ["".join(random_.choices(alphabet, k=random_.randrange(8))) for _ in range(2000)]
        mixed = [Rejected("binary"), *texts, Rejected("no_text")]
        together = cleaning.clean(mixed, params)
        assert [together[0], together[-1]] == [mixed[0], mixed[-1]]
        alone = [cleaning.clean([text], params)[0] for text in texts]
        assert list(map(repr, together[1:-1])) == list(map(repr, alone))
        assert sum(isinstance(text, str) for text in alone) > 200

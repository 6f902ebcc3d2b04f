"""Values in a page of Markdown: an independent parser finds text and nothing else, and the text is what it was."""

from pathlib import Path

import jinja2
import pytest
from markdown_it import MarkdownIt

from gptpipe.base.markdown import as_text, render
from gptpipe.shell.errors import printable

HOSTILE = [
    "<script>alert(1)</script>", "<b>bold</b>", "&lt;b&gt; &#27; &amp;", "**bold** _em_ ~~gone~~ `code`",
    "```\ncode\n```", "~~~\ncode", "# heading", "heading\n===", "heading\n---", "---", "***", "- item", "+ item",
    "* item", "1. item",
    "12) item", "> quote", "    code", "\tcode", "[a](javascript:b)", "![a](b)", "[a]: http://b", "<http://a.b>",
    "http://a.b www.a.b a@b.c", "| a | b |\n|---|---|\n| c | d |", "\\<b>", "a  \nb", "a\\\nb", "$x$", "<!-- a -->", "",
    "one\n\ntwo", "\x1b[31m \u202e caf\udce9", "ordinary text, (with) \"signs\"; 50% of 1.5! \u00e9 \u6f22 \U0001f642",
]  # fmt: skip
PLAIN = {"paragraph_open", "paragraph_close", "inline", "text", "text_special", "softbreak", "hardbreak"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_is_text_and_nothing_else(text: str) -> None:
    parser = MarkdownIt("gfm-like", {"linkify": False, "html": True})
    blocks = parser.parse(as_text(text))
    inline = [token for block in blocks for token in block.children or ()]
    assert {token.type for token in [*blocks, *inline]} <= PLAIN
    shown = "\n".join("".join(token.content or "\n" for token in block.children or ()) for block in blocks)
    assert shown.split() == printable(text).split()
    assert "<" not in as_text(text)


def test_a_value_stays_in_its_cell_and_its_quote(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("| a | b |\n|---|---|\n| {{ a }} | {{ b }} |\n\n> {{ c }}\n")
    page = render(tmp_path / "page.md", a="x | y", b="<b>", c="# z")
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(page)
    assert [block.content for block in blocks if block.type == "inline"][2:] == ["x &#124; y", "&#60;b&#62;", "&#35; z"]
    with pytest.raises(jinja2.UndefinedError):
        render(tmp_path / "page.md", a="x")

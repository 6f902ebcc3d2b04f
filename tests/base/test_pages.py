"""Values in pages: an independent parser finds only text, and it is the original text."""

from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
from markdown_it import MarkdownIt

from gptpipe.base.pages import as_text, render_html, render_markdown
from gptpipe.shell.errors import printable

HOSTILE = [
    "<script>alert(1)</script>",
    "<b>bold</b>",
    "&lt;b&gt; &#27; &amp;",
    "**bold** _em_ ~~gone~~ `code`",
    "```\ncode\n```",
    "~~~\ncode",
    "# heading",
    "heading\n===",
    "heading\n---",
    "---",
    "***",
    "- item",
    "+ item",
    "* item",
    "1. item",
    "12) item",
    "> quote",
    "    code",
    "\tcode",
    "[a](javascript:b)",
    "![a](b)",
    "[a]: http://b",
    "<http://a.b>",
    "http://a.b www.a.b a@b.c",
    "| a | b |\n|---|---|\n| c | d |",
    "\\<b>",
    "a  \nb",
    "a\\\nb",
    "$x$",
    "<!-- a -->",
    "",
    "one\n\ntwo",
    "\x1b[31m \u202e caf\udce9",
    'ordinary text, (with) "signs"; 50% of 1.5! \u00e9 \u6f22 \U0001f642',
]
PLAIN = {"paragraph_open", "paragraph_close", "inline", "text", "text_special", "softbreak", "hardbreak"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_in_markdown_is_only_text(text: str) -> None:
    parser = MarkdownIt("gfm-like", {"linkify": False, "html": True})
    blocks = parser.parse(as_text(text))
    inline = [token for block in blocks for token in block.children or ()]
    assert {token.type for token in [*blocks, *inline]} <= PLAIN
    shown = "\n".join("".join(token.content or "\n" for token in block.children or ()) for block in blocks)
    assert shown.split() == printable(text).split()
    assert "<" not in as_text(text)


def test_a_value_cannot_leave_its_cell_or_its_quote(tmp_path: Path) -> None:
    template = tmp_path / "page.md.jinja"
    template.write_text("| a | b |\n|---|---|\n| {{ a }} | {{ b }} |\n\n> {{ c }}\n")
    page = render_markdown(template, a="x | y", b="<b>", c="# z")
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(page)
    contents = [block.content for block in blocks if block.type == "inline"]
    assert contents[2:] == ["x &#124; y", "&#60;b&#62;", "&#35; z"]


def test_html_escapes_values(tmp_path: Path) -> None:
    template = tmp_path / "page.html.jinja"
    template.write_text("<p title='{{ a }}'>{{ a }}{{ b|safe }}</p>\n")
    page = render_html(template, a="<script>'&", b="<svg>")
    assert page == "<p title='&lt;script&gt;&#39;&amp;'>&lt;script&gt;&#39;&amp;<svg></p>\n"


@pytest.mark.parametrize("render", [render_markdown, render_html])
def test_a_missing_value_is_an_error(tmp_path: Path, render: Callable[..., str]) -> None:
    (tmp_path / "page.jinja").write_text("{{ a }} {{ b }}")
    with pytest.raises(jinja2.UndefinedError):
        render(tmp_path / "page.jinja", a="x")

"""Markdown pages from templates. Every value is shown as text: it can be neither HTML nor Markdown."""

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gptpipe.shell.errors import printable

# What has a meaning anywhere, then what has one at the start of a line, or as an address that becomes a link.
_ACTIVE = re.compile(r"[&<>\\`*_~|\[\]$@]|^[-+=#]|^\d(?=\d*[.)](?:\s|$))|:(?=//)|(?<=www)\.", re.MULTILINE)
_INDENT = re.compile(r"^(?: {2,}|\t)[ \t]*", re.MULTILINE)  # four spaces make a block of code


def as_text(value: Any) -> Markup:
    """Markdown that shows a value as it is. Active characters become entities, which no parser takes for markup.

    A value that is marked as safe stays.
    """
    if isinstance(value, Markup):
        return value
    text = _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", printable(str(value)))
    return Markup(_INDENT.sub(lambda match: "&nbsp;" * len(match[0].expandtabs(4)), text))


def snippet(text: str, n_characters: int) -> str:
    """The start of a text on one line, for a page."""
    return printable(" ".join(text[: 4 * n_characters].split()))[:n_characters]


def render(template: Path, **values: Any) -> str:
    """The page of a template; a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        finalize=as_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["as_text"] = as_text
    return environment.get_template(template.name).render(**values)

"""Pages from Jinja templates, in Markdown and in HTML. Values are shown as text and cannot contain markup."""

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gptpipe.shell.errors import printable

# Characters that are active anywhere, then those active at the start of a line or making an address a link.
_ACTIVE = re.compile(r"[&<>\\`*_~|\[\]$@]|^[-+=#]|^\d(?=\d*[.)](?:\s|$))|:(?=//)|(?<=www)\.", re.MULTILINE)
_INDENT = re.compile(r"^(?: {2,}|\t)[ \t]*", re.MULTILINE)  # an indent of four spaces starts a code block


def as_text(value: Any) -> Markup:
    """Markdown that shows a value as it is.

    Active characters become entities, which no parser takes for markup. A value marked as safe does not change.
    """
    if isinstance(value, Markup):
        return value
    text = _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", printable(str(value)))
    return Markup(_INDENT.sub(lambda match: "&nbsp;" * len(match[0].expandtabs(4)), text))


def snippet(text: str, n_characters: int) -> str:
    """The start of a text on one line, for a page."""
    return printable(" ".join(text[: 4 * n_characters].split()))[:n_characters]


def render_markdown(template: Path, **values: Any) -> str:
    """A page of Markdown. A variable of the template that has no value is an error."""
    environment = _environment(template.parent, finalize=as_text)
    environment.filters["as_text"] = as_text
    return environment.get_template(template.name).render(**values)


def render_html(template: Path, **values: Any) -> str:
    """A page of HTML. A variable of the template that has no value is an error."""
    return _environment(template.parent, autoescape=True).get_template(template.name).render(**values)


def _environment(folder: Path, **options: Any) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        **options,
    )

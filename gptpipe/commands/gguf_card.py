"""The model card as keys of a GGUF file: name, description, tags, training data and its licences.

The file travels alone, so it says what the card says. Stage train writes a card into the model folder, and
stage evaluate the complete one, which also names the data, as reports/model_card.md.
"""

import html
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

_CARD = re.compile(r"---\n(?P<header>.*?)---\n\s*# (?P<name>[^\n]+)\n(?P<body>.*)", re.DOTALL)
_MAX_HEADER = 1 << 16  # characters
NOT_STATED = "not stated"


class _Source(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    license: str


class _Header(BaseModel):
    """What is used of a card's header."""

    model_config = ConfigDict(strict=True)
    tags: list[str] = []
    pipeline_tag: str = "text-generation"
    training_data: list[_Source] = []


def card_fields(model: Path) -> dict[str, Any]:
    """Keys and values from the card in the model folder, and from the complete one if it is of this model.

    No keys for a folder without a card, or with one that gptpipe has not written; none about data without the
    complete card.
    """
    path = model / "README.md"
    card = _CARD.match(_text(path))
    if card is None:
        return {}
    complete = _CARD.match(_text(model.resolve().parent.parent / "reports" / "model_card.md"))
    is_of_model = complete is not None and card["body"].strip() in complete["body"]
    header = _header((complete if complete and is_of_model else card)["header"])
    if header is None:
        return {}
    paragraphs, _, _ = card["body"].partition("\n- ")
    fields: dict[str, Any] = {
        "general.name": card["name"],
        "general.description": html.unescape(" ".join(paragraphs.split())),
        "general.tags": [*header.tags, header.pipeline_tag],
    }
    return fields | _data_fields([source.model_dump() for source in header.training_data])


def _data_fields(sources: list[dict[str, str]]) -> dict[str, Any]:
    """A data set for each source. The licences are those of the texts: nobody has stated one of the model."""
    if not sources:
        return {}
    fields: dict[str, Any] = {"general.dataset.count": len(sources)}
    for number, source in enumerate(sources):
        fields[f"general.dataset.{number}.name"] = source["name"]
        fields[f"general.dataset.{number}.description"] = f"licence: {source['license']}"
    licenses = sorted({source["license"] for source in sources}, key=lambda text: (text == NOT_STATED, text))
    return fields | {"general.license.name": f"of the training data: {', '.join(licenses)}"}


def _text(path: Path) -> str:
    """The text of a file; an empty one if there is no file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _header(text: str) -> _Header | None:
    """The values of a header; None if it is not as gptpipe writes it, for example in a model from elsewhere."""
    if len(text) > _MAX_HEADER:
        return None
    try:
        return _Header.model_validate(YAML(typ="safe", pure=True).load(text))
    except Exception:  # ruamel.yaml raises many kinds, also for values with a tag or nested too deeply
        return None

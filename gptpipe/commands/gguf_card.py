"""The model card as keys of a GGUF file: name, description, tags, training data and its licences.

The file travels alone, so it says what the card says. Stage train writes a card into the model folder, and
stage evaluate the complete one, which also names the data, as reports/model_card.md.
"""

import html
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gptpipe.shell.errors import IntegrityError

_CARD = re.compile(r"---\n(?P<header>.*?)---\n\s*# (?P<name>[^\n]+)\n(?P<body>.*)", re.DOTALL)
NOT_STATED = "not stated"


def card_fields(model: Path) -> dict[str, Any]:
    """Keys and values from the card in the model folder, and from the complete one if it is of this model.

    No keys for a folder without a card; none about data without the complete one. Raises IntegrityError for a
    card that nobody can read.
    """
    path = model / "README.md"
    if not path.exists():
        return {}
    card = _read(path)
    complete_path = model.resolve().parent.parent / "reports" / "model_card.md"
    is_of_model = complete_path.exists() and card["body"].strip() in _text(complete_path)
    header = _header(complete_path if is_of_model else path)
    paragraphs, _, _ = card["body"].partition("\n- ")
    fields: dict[str, Any] = {
        "general.name": card["name"],
        "general.description": html.unescape(" ".join(paragraphs.split())),
        "general.tags": [*header["tags"], header["pipeline_tag"]],
    }
    return fields | _data_fields(header["training_data"])


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
    return path.read_text(encoding="utf-8", errors="replace")


def _read(path: Path) -> re.Match[str]:
    match = _CARD.match(_text(path))
    if match is None:
        raise IntegrityError(f"{path}: not a model card as gptpipe writes it; run `dvc repro` again")
    return match


def _header(path: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = YAML(typ="safe").load(_read(path)["header"])
        return {"tags": [], "pipeline_tag": "text-generation", "training_data": [], **header}
    except (YAMLError, TypeError) as error:
        raise IntegrityError(f"{path}: its header is not YAML; run `dvc repro` again") from error

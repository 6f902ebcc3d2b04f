"""The model card that training writes: what it knows, before anything is evaluated."""

from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from gptpipe.config import Params
from gptpipe.files import Manifest


def model_card(params: Params, summary: dict[str, Any], lineage: Manifest) -> str:
    """README.md of a model folder, with the metadata header that model hubs read."""
    text = Path(__file__).with_name("card.jinja").read_text(encoding="utf-8")
    template = Template(text, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    origin = "from scratch" if params.train.init_from is None else f"from the weights in `{params.train.init_from}`"
    ancestors = sorted(lineage.lineage("split").items())
    return str(template.render(**dict(params), val=summary["val"], summary=summary, origin=origin, ancestors=ancestors))

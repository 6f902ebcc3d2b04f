"""Reads the texts of sources without the rest of stage collect, and changes limits in its worker processes."""

import importlib
from typing import Any

from gptpipe.collect.candidates import find_candidates
from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import Part, find_files, plan_parts
from gptpipe.collect.readers import read_part
from gptpipe.collect.texts import Rejected, Texts
from gptpipe.shell.errors import InputError


def read_source(params: CollectParams, digests: dict[str, str] | None = None) -> Texts:
    """The lists of texts of the only source, read in this process.

    Raises InputError for a bad record, unless the source skips it.
    """
    (source,) = params.sources
    for part in plan_parts(params, find_files(params.sources)):
        for texts in read_part(part, source, params, {} if digests is None else digests):
            for text in texts:
                if isinstance(text, Rejected) and text.is_bad and source.on_bad == "stop":
                    raise InputError(text.detail)
            yield texts


def find_candidates_with(
    part: Part, *, folder: Any, params: CollectParams, constants: dict[str, int]
) -> tuple[Part, dict[str, Any]]:
    """`find_candidates` in a worker process, where constants such as `readers._MEMORY` have other values."""
    for name, value in constants.items():
        module, constant = name.split(".")
        setattr(importlib.import_module(f"gptpipe.collect.{module}"), constant, value)
    return find_candidates(part, folder=folder, params=params)

"""Reads all texts of one source in this process, without cleaning them."""

from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import find_files, plan_parts
from gptpipe.collect.readers import read_part
from gptpipe.collect.texts import Rejected, Texts
from gptpipe.shell.errors import InputError


def read_source(params: CollectParams, digests: dict[str, str] | None = None) -> Texts:
    """The lists of texts of the only source. Raises InputError for a bad record, unless the source skips it."""
    (source,) = params.sources
    for part in plan_parts(params, find_files(params.sources)):
        for texts in read_part(part, source, params, {} if digests is None else digests):
            for text in texts:
                if isinstance(text, Rejected) and text.is_bad and source.on_bad == "stop":
                    raise InputError(text.detail)
            yield texts

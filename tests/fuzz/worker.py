"""What a worker process does for the target `parquet-process`: a module of its own, to start without torch."""

from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import Part
from gptpipe.collect.readers import read_part
from gptpipe.collect.texts import Rejected


def bad_records(part: Part, *, params: CollectParams) -> list[str]:
    """Descriptions of the bad records of a part."""
    lists = read_part(part, params.sources[0], params, {})
    return [text.detail for texts in lists for text in texts if isinstance(text, Rejected) and text.is_bad]

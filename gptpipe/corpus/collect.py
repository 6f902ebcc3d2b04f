"""Stage collect as one function: sources in, clean and distinct documents out, everything left out counted."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gptpipe.config import CollectParams
from gptpipe.console import Progress
from gptpipe.corpus.cleaning import Rejected, clean
from gptpipe.corpus.dedup import near_duplicates
from gptpipe.corpus.document import Document
from gptpipe.corpus.shards import read_documents, shard_paths, write_shards
from gptpipe.corpus.sources import fingerprint, read
from gptpipe.corpus.tally import Tally
from gptpipe.environment import optional_module
from gptpipe.errors import InputError
from gptpipe.files import new_folder


def collect(params: CollectParams, target: Path, report: Path | None = None) -> dict[str, int]:
    """Write the corpus to `target` and return its counts: documents in = kept + rejected, by reason; also to `report`.

    Raises InputError where a source cannot be read or nothing is left.
    """
    if near := params.dedup == "near":
        optional_module("rensa", "near")  # said now, not after the first pass
    kinds = [source.kind for source in params.sources]
    counts = Tally(*(kind if kinds.count(kind) == 1 else f"{kind}-{i}" for i, kind in enumerate(kinds)))
    made_from = fingerprint(params.sources)
    with new_folder(target, made_from) as folder, Progress("collect", unit="documents") as progress:
        exact = folder.path / "exact" if near else folder.path
        write_shards(_documents(params, counts, made_from), exact, progress.advance)
        if near:
            write_shards(_without_near_duplicates(exact, params, counts), folder.path)
            shutil.rmtree(exact)
        if report:
            counts.write(report)
        folder.counts = dict(counts)
        if not counts["documents"]:
            raise InputError(f"collect: no document left of {counts['documents_in']} ({_in_words(counts)}); add text")
    return dict(counts)


def _documents(params: CollectParams, counts: Tally, digests: dict[str, str]) -> Iterator[Document]:
    """Kept documents of all sources; notes in `counts` what comes in, stays and goes."""
    seen: set[bytes] = set()  # 16 bytes of each id: about 100 MB of memory per million documents
    for name, source in zip(counts.by_source, params.sources, strict=True):
        n_documents = n_bytes = 0
        for text in read(source, params, counts, digests):
            counts["documents_in"] += 1
            try:
                if isinstance(text, Rejected):
                    raise text
                document = Document(name, clean(text, params))
                if source.weight < 1 and int(document.id[-8:], 16) >= source.weight * 2**32:
                    raise Rejected("weighted_out")
                if params.dedup != "none":
                    if (key := bytes.fromhex(document.id[:32])) in seen:
                        raise Rejected("duplicate")
                    seen.add(key)
            except Rejected as rejected:
                counts.reject(name, rejected, text)
                continue
            counts.keep(document)
            if params.encoding_errors == "replace" and "\ufffd" in document.text:
                counts["with_replacement_character"] += 1
            yield document
            n_documents, n_bytes = n_documents + 1, n_bytes + document.n_bytes
            if n_documents == source.max_documents or (source.max_bytes and n_bytes >= source.max_bytes):
                break


def _without_near_duplicates(folder: Path, params: CollectParams, counts: Tally) -> Iterator[Document]:
    shards = shard_paths(folder)
    repeats = near_duplicates(shards, params.near_similarity, folder / "signatures")
    documents = (document for shard in shards for _, document in read_documents(shard))
    for document, is_repeat in zip(documents, repeats, strict=True):
        if is_repeat:
            counts.keep(document, -1)
            counts.reject(document.source, Rejected("near_duplicate"), document.text)
        else:
            yield document


def _in_words(counts: Counter[str]) -> str:
    reasons = {name.removeprefix("rejected_"): n for name, n in sorted(counts.items()) if name.startswith("rejected_")}
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "the sources are empty"

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
from gptpipe.corpus.rejections import Rejections
from gptpipe.corpus.shards import read_documents, shard_paths, write_shards
from gptpipe.corpus.sources import fingerprint, read
from gptpipe.environment import optional_module
from gptpipe.errors import InputError
from gptpipe.files import new_folder


def collect(params: CollectParams, target: Path) -> dict[str, int]:
    """Write the corpus to `target` and return its counts: documents in = kept + rejected, by reason.

    Raises InputError where a source cannot be read or nothing is left.
    """
    if near := params.dedup == "near":
        optional_module("rensa", "near")  # said now, not after the first pass
    counts: Counter[str] = Counter({"documents_in": 0, "documents": 0, "bytes": 0})
    made_from, left_out = fingerprint(params.sources), Rejections()
    with new_folder(target, made_from) as folder, Progress("collect", unit="documents") as progress:
        exact = folder.path / "exact" if near else folder.path
        write_shards(progress.track(_documents(params, counts, left_out, made_from)), exact)
        if near:
            write_shards(_without_near_duplicates(exact, params, counts, left_out), folder.path)
            shutil.rmtree(exact)
        left_out.save(folder.path)
        folder.counts = dict(counts)
        if not counts["documents"]:
            raise InputError(f"collect: no document left of {counts['documents_in']} ({_in_words(counts)}); add text")
    return dict(counts)


def _documents(
    params: CollectParams, counts: Counter[str], left_out: Rejections, digests: dict[str, str]
) -> Iterator[Document]:
    """Kept documents of all sources; notes in `counts` and `left_out` what comes in, stays and goes."""
    seen: set[bytes] = set()  # 16 bytes of each id: about 100 MB of memory per million documents
    names = [source.kind for source in params.sources]
    for position, source in enumerate(params.sources):
        name = source.kind if names.count(source.kind) == 1 else f"{source.kind}-{position}"
        n_documents = n_bytes = 0
        left_out.keep(name, 0, 0)
        for text in read(source, params, counts, digests):
            counts["documents_in"] += 1
            try:
                if isinstance(text, Rejected):
                    raise text
                document = Document(name, clean(text, params))
                if int(document.id[-8:], 16) >= source.weight * 2**32:
                    raise Rejected("weighted_out")
                if params.dedup != "none":
                    if (key := bytes.fromhex(document.id[:32])) in seen:
                        raise Rejected("duplicate")
                    seen.add(key)
            except Rejected as rejected:
                counts[f"rejected_{rejected.reason}"] += 1
                left_out.reject(name, rejected, text if isinstance(text, str) else "")
                continue
            counts["documents"] += 1
            counts["bytes"] += document.n_bytes
            left_out.keep(name, document.n_bytes)
            if params.encoding_errors == "replace" and "\ufffd" in document.text:
                counts["with_replacement_character"] += 1
            yield document
            n_documents, n_bytes = n_documents + 1, n_bytes + document.n_bytes
            if n_documents == source.max_documents or (source.max_bytes and n_bytes >= source.max_bytes):
                break


def _without_near_duplicates(
    folder: Path, params: CollectParams, counts: Counter[str], left_out: Rejections
) -> Iterator[Document]:
    shards = shard_paths(folder)
    repeats = near_duplicates(shards, params.near_similarity, folder / "signatures")
    documents = (document for shard in shards for _, document in read_documents(shard))
    for document, is_repeat in zip(documents, repeats, strict=True):
        if is_repeat:
            counts["rejected_near_duplicate"] += 1
            left_out.keep(document.source, document.n_bytes, -1)
            left_out.reject(document.source, Rejected("near_duplicate"), document.text)
            counts["documents"] -= 1
            counts["bytes"] -= document.n_bytes
        else:
            yield document


def _in_words(counts: Counter[str]) -> str:
    reasons = {name.removeprefix("rejected_"): n for name, n in sorted(counts.items()) if name.startswith("rejected_")}
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "the sources are empty"

"""Stage tokenize as one function: documents in, token shards and the tokenizer out."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gptpipe.base.manifest import new_folder
from gptpipe.base.parallel import map_in_order
from gptpipe.base.parquet import new_parquet, read_parquet, strings
from gptpipe.base.resume import key_of, once
from gptpipe.formats.corpus import shard_paths, verify_corpus
from gptpipe.formats.sides import SIDES, Fractions, sides_of
from gptpipe.formats.tokenizer import ENCODING, RANKS, TOKENIZER, Tokenizer
from gptpipe.shell.console import Progress
from gptpipe.shell.errors import InputError
from gptpipe.shell.process import ended_by_signals
from gptpipe.tokenize.params import TokenizeParams
from gptpipe.tokenize.tokenizers import build_tokenizer


def tokenize(source: Path, target: Path, params: TokenizeParams, fractions: Fractions, seed: int) -> dict[str, int]:
    """Encode every document of `source` into `target` and return the counts.

    A trained tokenizer is fitted on the documents that the split will put into train, so no byte of the others can
    shape the vocabulary. After a kill, shards that were finished are not made again. Raises InputError, IntegrityError.
    """
    parent = verify_corpus(source)
    shards = shard_paths(source)
    lineage = parent.lineage(source.name)
    key = key_of("tokenize", [lineage, params.model_dump(), fractions, seed], "pyarrow", "rustbpe", "tiktoken")
    share = params.training_bytes / max(1, parent.counts["bytes"])
    with new_folder(target, lineage, key) as folder:
        own = folder.path / TOKENIZER

        def make_tokenizer() -> None:
            with ended_by_signals():
                tokenizer = build_tokenizer(params, _train_texts(shards, fractions, seed, share))
            tokenizer.save(own)

        once([own / RANKS, own / ENCODING], make_tokenizer)
        tokenizer = Tokenizer.load(own)
        work = partial(_finished_shard, tokenizer=tokenizer, target=folder.path)
        with Progress("tokenize", unit="shards", total=len(shards)) as progress:
            counts = list(progress.track(map_in_order(work, shards, threads=True)))
        total = {key: sum(count[key] for count in counts) for key in counts[0]}
        folder.counts = {**total, "vocab_size": tokenizer.vocab_size}
    return {**total, "vocab_size": tokenizer.vocab_size}


def _train_texts(shards: list[Path], fractions: Fractions, seed: int, share: float) -> Iterator[str]:
    """The train documents' texts, or about a share of them, drawn by id."""

    def chosen(batch: pa.RecordBatch) -> pa.RecordBatch:
        ids = strings(batch, "id")
        is_drawn = np.array([int(id_[16:24], 16) < share * 2**32 for id_ in ids])
        return batch.filter(pa.array(is_drawn & (sides_of(ids, fractions, seed) == SIDES.index("train"))))

    batches = chain.from_iterable(read_parquet(shard, ["id", "text"]) for shard in shards)
    texts = chain.from_iterable(strings(chosen(batch), "text") for batch in batches)
    first = next(texts, None)
    if first is None:
        raise InputError("no document falls on the train side: add documents, or change split's fractions or the seed")
    return chain([first], texts)


def _finished_shard(shard: Path, *, tokenizer: Tokenizer, target: Path) -> dict[str, int]:
    """Counts of one shard, encoded now or before a kill; runs in a thread."""
    path = target / shard.name.replace("docs", "tokens")
    return once([path], lambda: _encode_shard(shard, path, tokenizer))


def _encode_shard(shard: Path, path: Path, tokenizer: Tokenizer) -> dict[str, int]:
    token = pa.uint16() if tokenizer.dtype.itemsize == 2 else pa.uint32()
    schema = pa.schema(
        [("id", pa.string()), ("source", pa.string()), ("n_bytes", pa.int64()), ("tokens", pa.list_(token))]
    )
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    with new_parquet(path, schema) as rows:
        for batch in read_parquet(shard, ["id", "source", "n_bytes", "text"]):
            ids = tokenizer.encode_documents(strings(batch, "text"))
            ends = np.concatenate([[0], np.flatnonzero(ids == tokenizer.end_of_text) + 1])
            tokens = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(ids))
            columns = [batch.column("id"), batch.column("source"), batch.column("n_bytes"), tokens]
            rows.extend(pa.RecordBatch.from_arrays(columns, schema=schema))
            counts["documents"] += len(batch)
            counts["tokens"] += len(ids)
            counts["bytes"] += pc.sum(batch.column("n_bytes")).as_py()
    return counts

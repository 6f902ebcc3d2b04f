"""Stage tokenize: reads the corpus, writes token shards and the tokenizer that made them."""

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gptpipe.base.files import sha256_of
from gptpipe.base.manifest import new_folder
from gptpipe.base.parallel import map_in_order
from gptpipe.base.parquet import new_parquet, read_parquet, strings
from gptpipe.base.resume import key_of, once
from gptpipe.formats.corpus import shard_paths, verify_corpus
from gptpipe.formats.sides import SIDES, Fractions, sides_of
from gptpipe.formats.token_shards import token_schema, token_shard_path
from gptpipe.formats.tokenizer import ENCODING, RANKS, TOKENIZER, Tokenizer
from gptpipe.shell.console import Progress
from gptpipe.shell.errors import InputError
from gptpipe.shell.process import ended_by_signals
from gptpipe.tokenize.params import TokenizeParams
from gptpipe.tokenize.tokenizers import build_tokenizer, model_tokenizer
from gptpipe.tokenize.training_text import affordable

_SMALL_BYTES = 1 << 26  # of text: below, starting worker processes costs more than it saves


def tokenize(
    source: Path,
    target: Path,
    params: TokenizeParams,
    fractions: Fractions,
    seed: int,
    model: Path | None = None,
) -> dict[str, int]:
    """Encode every document of the corpus `source` into `target`, and return the counts.

    `model` is the model folder that `tokenize.encoding` names: its tokenizer is used.

    A tokenizer is trained only on documents that the split puts into train, so held-out text cannot shape the
    vocabulary. After a kill, finished shards are kept. Raises InputError, IntegrityError.
    """
    parent = verify_corpus(source)
    shards = shard_paths(source)
    is_small = parent.counts["bytes"] < _SMALL_BYTES
    made_from = parent.lineage(source.name)
    given = model_tokenizer(model, params.encoding) if model else None
    determinants = [made_from, params.model_dump(), fractions, seed, model and _digest(model)]
    key = key_of("tokenize", determinants, "pyarrow", "rustbpe", "tiktoken")
    with new_folder(target, made_from, key) as folder:
        tokenizer_folder = folder.path / TOKENIZER

        def make_tokenizer() -> None:
            if given:
                given.save(tokenizer_folder)
                return
            share = params.training_bytes / max(1, parent.counts["bytes"])
            read = partial(_training_texts, shards, fractions, seed, share, is_small)
            texts = affordable(read) if params.is_trained else ()
            with ended_by_signals():
                tokenizer = build_tokenizer(params, texts)
            tokenizer.save(tokenizer_folder)

        once([tokenizer_folder / RANKS, tokenizer_folder / ENCODING], make_tokenizer)
        tokenizer = _load_tokenizer(tokenizer_folder, _digest(tokenizer_folder))
        encode = partial(_encode_shard_once, digest=_digest(tokenizer_folder), folder=folder.path)
        with Progress("tokenize", unit="shards", total=len(shards)) as progress:
            # Threads start at once; but beside tiktoken, they wait for each other.
            shard_counts = list(progress.track(map_in_order(encode, shards, threads=is_small, small=is_small)))
        folder.counts = {name: sum(counts[name] for counts in shard_counts) for name in shard_counts[0]}
        folder.counts["vocab_size"] = tokenizer.vocab_size
    return folder.counts


def _training_texts(
    shards: list[Path], fractions: Fractions, seed: int, share: float, is_small: bool
) -> Iterator[str]:
    """The texts of all train documents, or of about a `share` of them, chosen by id."""
    read = partial(_training_texts_of, fractions=fractions, seed=seed, share=share)
    texts = chain.from_iterable(map_in_order(read, shards, small=is_small))
    first = next(texts, None)
    if first is None:
        raise InputError(
            "tokenize: no document is on the train side; add documents, lower split.val_fraction and "
            "split.test_fraction, or change the seed"
        )
    return chain([first], texts)


def _training_texts_of(shard: Path, *, fractions: Fractions, seed: int, share: float) -> list[str]:
    """Those of one shard."""
    texts: list[str] = []
    for batch in read_parquet(shard, ["id", "text"]):
        ids = strings(batch, "id")
        is_train = sides_of(ids, fractions, seed) == SIDES.index("train")
        is_chosen = np.array([int(id_[16:24], 16) < share * 2**32 for id_ in ids])
        texts += strings(batch.filter(pa.array(is_train & is_chosen)), "text")
    return texts


def _digest(tokenizer_folder: Path) -> str:
    return "".join(sha256_of(tokenizer_folder / name) for name in (RANKS, ENCODING))


@lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, digest: str) -> Tokenizer:
    """A worker loads the tokenizer once, not for each shard. `digest` identifies the content of the folder."""
    return Tokenizer.load(folder)


def _encode_shard_once(shard: Path, *, digest: str, folder: Path) -> dict[str, int]:
    """Counts of one shard, which is encoded unless it was finished before a kill; runs in a worker."""
    path = token_shard_path(folder, shard)
    return once([path], lambda: _encode_shard(shard, path, _load_tokenizer(folder / TOKENIZER, digest)))


def _encode_shard(shard: Path, path: Path, tokenizer: Tokenizer) -> dict[str, int]:
    schema = token_schema(tokenizer.dtype)
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    with new_parquet(path, schema) as rows:
        for batch in read_parquet(shard, ["id", "source", "n_bytes", "text"]):
            ids = tokenizer.encode_documents(strings(batch, "text"))
            ends = np.flatnonzero(ids == tokenizer.end_of_text) + 1
            bounds = pa.array(np.concatenate([[0], ends]), pa.int32())
            tokens = pa.ListArray.from_arrays(bounds, pa.array(ids))
            columns = [batch.column("id"), batch.column("source"), batch.column("n_bytes")]
            columns += [pa.array(np.diff(ends, prepend=0)), tokens]
            rows.extend(pa.RecordBatch.from_arrays(columns, schema=schema))
            counts["documents"] += len(batch)
            counts["tokens"] += len(ids)
            counts["bytes"] += pc.sum(batch.column("n_bytes")).as_py()
    return counts

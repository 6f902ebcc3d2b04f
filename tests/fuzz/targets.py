"""The parsers that are fuzzed. Each finds its input, and the files around it, in the current folder."""

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
from reading import read_source
from sections import SHIPPED, filters

from gptpipe.base.files import seal, sha256_of
from gptpipe.base.manifest import MANIFEST, SCHEMA, FileEntry, Manifest, new_folder, read_manifest, verify
from gptpipe.base.parallel import map_in_order
from gptpipe.base.resume import finished
from gptpipe.collect.cleaning import clean
from gptpipe.collect.params import CollectParams
from gptpipe.collect.parts import find_files, plan_parts
from gptpipe.collect.tables import parquet_rows
from gptpipe.formats.hf_tokenizer import check_same_tokens, to_tokenizer_json
from gptpipe.formats.streams import open_stream
from gptpipe.formats.tokenizer import ENCODING, RANKS, Tokenizer
from gptpipe.model.hf_config import CONFIG
from gptpipe.model.hf_weights import WEIGHTS, load_model, save_model
from gptpipe.params import load_params
from gptpipe.score.metrics import VALIDATION_METRICS
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError
from gptpipe.tokenize.tokenizers import train_tokenizer
from gptpipe.train.checkpoint import Checkpoints

from . import mutations
from .engine import Target
from .worker import bad_records

ROOT = Path(__file__).parents[2]
SENTENCES = [
    f"The {animal} sat on the mat, naïve as ever {i}." for i, animal in enumerate(("cat", "dog", "owl"))
]


def _sign(folder: Path, name: str) -> None:
    """Update the manifest of a folder to the current content of a file, as if a stage had written it."""
    manifest = read_manifest(folder)
    entry = FileEntry(sha256=sha256_of(folder / name), n_bytes=(folder / name).stat().st_size)
    changed = manifest.model_copy(update={"files": {**manifest.files, name: entry}})
    (folder / MANIFEST).write_bytes(changed.to_bytes())


# params.yaml


def _params_seeds(_: Path) -> list[bytes]:
    text = (ROOT / "params.yaml").read_text()
    plain = "\n".join(
        line.partition(" #")[0].rstrip() for line in text.splitlines() if not line.startswith("#")
    )
    sections = plain.split("\n\n")
    extra = (
        b"seed: 1\ncollect:\n  sources: [{kind: url, url: 'https://x', sha256: '0'}]\n",
        b"a: &a [1, 2]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: {<<: {x: 1}}\n",
        b"seed: !!int '3'\ntrain: ? x\n: y\n",
        json.dumps({"seed": 1, "model": {"n_layer": 2}}).encode(),
    )
    return [plain.encode(), *(section.encode() for section in sections), *extra]


def _params(content: bytes) -> None:
    Path("params.yaml").write_bytes(content)
    load_params(Path("params.yaml"))


# Manifests


def _manifest_seeds(folder: Path) -> list[bytes]:
    made = tiny.make_model(folder / "made")
    small = folder / "small"
    small.mkdir()
    (small / "a").write_bytes(b"a")
    entry = FileEntry(sha256=sha256_of(small / "a"), n_bytes=1)
    counts = {"documents": 1}
    manifest = Manifest(schema_version=SCHEMA, made_from={"raw": "0" * 64}, counts=counts, files={"a": entry})
    seeds = [(made / MANIFEST).read_bytes(), manifest.to_bytes()]
    shutil.rmtree(made)
    return seeds


def _manifest(content: bytes) -> None:
    Path("small", MANIFEST).write_bytes(content)
    manifest = verify(Path("small"))
    manifest.lineage("small")


def _done_seeds(_: Path) -> list[bytes]:
    sound = {
        "files": {"shard": hashlib.sha256(b"a").hexdigest()},
        "key": "",
        "result": {"counts": {"documents": 1}},
    }
    return [seal(sound), seal({"files": ["0" * 64], "key": "", "result": None}), b"[]", b"{}"]


def _done(content: bytes) -> None:
    Path(".shard.done").write_bytes(content)
    Path("shard").write_bytes(b"a")
    finished([Path("shard")])


# Sources of text


@cache
def _collect_params(errors: str = "strict") -> CollectParams:
    changed = {
        "filters": filters(),
        "encoding_errors": errors,
        "max_document_bytes": 1000,
        "min_document_bytes": 1,
    }
    return CollectParams.model_validate({**dict(SHIPPED.collect), **changed})


def _read(content: bytes, **source: Any) -> None:
    """Read and clean an input, as stage collect does."""
    Path("input").write_bytes(content)
    params = _collect_params("replace" if len(content) % 4 == 0 else "strict")
    params = params.model_validate({**dict(params), "sources": ({"paths": ("input",), **source},)})
    for texts in read_source(params):
        for text in clean(texts, params):
            if isinstance(text, str):
                text.encode()


def _read_in_worker(content: bytes) -> None:
    """Read a Parquet file as stage collect does: in a worker process, whose crash is an InputError."""
    Path("input").write_bytes(content)
    source = {"kind": "parquet", "paths": ("input",)}
    params = CollectParams.model_validate({**dict(_collect_params()), "sources": (source,)})
    parts = plan_parts(params, find_files(params.sources))
    for bad in map_in_order(partial(bad_records, params=params), parts, isolate=True, parses=str):
        if bad:
            raise InputError(bad[0])


def _text_seeds(_: Path) -> list[bytes]:
    text = "\n\n".join(SENTENCES)
    return [
        text.encode(),
        text.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + text.encode(),
        text.encode("utf-16"),
        "e\u0301\u0344\u0e33 \u2028\x85\xa0\u200d\U0001f468".encode() * 20,
        (" " * 1100 + "\u0301" * 1100 + "\n" * 900).encode(),
        b"%PDF-1.4\n",
        b"",
    ]


def _jsonl_seeds(_: Path) -> list[bytes]:
    lines = "".join(json.dumps({"text": sentence, "n": i}) + "\n" for i, sentence in enumerate(SENTENCES))
    more = (
        '{"text": "\\ud83d\\ude00 \\ud800 \\u0000"}\n\n  {"text": null}\n[1, 2]\n"text"\n{"a": {"text": "b"}}'
    )
    return [lines.encode(), b"\xef\xbb\xbf" + lines.encode(), more.encode(), ("[" * 2000 + "]" * 2000).encode()]


def _parquet_bytes(texts: list[str | None], **options: Any) -> bytes:
    file = io.BytesIO()
    table = pa.table({"text": pa.array(texts, options.pop("type", pa.string())), "n": range(len(texts))})
    pq.write_table(table, file, store_schema=False, **options)
    return file.getvalue()


def _parquet_seeds(_: Path) -> list[bytes]:
    return [
        _parquet_bytes([*SENTENCES, None], compression="none", use_dictionary=False),
        _parquet_bytes(SENTENCES * 20, compression="snappy"),
        _parquet_bytes(SENTENCES, compression="zstd", data_page_version="2.0", row_group_size=1),
        _parquet_bytes(
            SENTENCES,
            compression="gzip",
            write_page_checksum=True,
            use_dictionary=False,
            column_encoding={"text": "DELTA_BYTE_ARRAY"},
        ),
        _parquet_bytes(SENTENCES, compression="lz4", type=pa.large_string(), version="1.0"),
    ]


def _parquet(content: bytes) -> None:
    """The part that the pipeline runs in a worker process, which reports that it needs too much memory."""
    try:
        for texts in parquet_rows("input", io.BytesIO(content), "text", "strict", 64 << 20, 200):
            clean(texts, _collect_params())
    except MemoryError:
        needs_too_much = True
    else:
        needs_too_much = False
    if needs_too_much:  # not in the handler: an error there would have the MemoryError as its context
        _read_in_worker(content)


def _tar(members: dict[str, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, member in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(member)
            if options.get("format") == tarfile.PAX_FORMAT:
                info.pax_headers = {"comment": "naïve", "mtime": "1.5"}
            archive.addfile(info, io.BytesIO(member))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../outside"
        archive.addfile(link)
    return file.getvalue()[: 512 * 14]  # without most of the padding


def _zip(members: dict[str, bytes], method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member, compress_type=method)
    return file.getvalue()


def _archive_seeds(_: Path) -> list[bytes]:
    text = "\n".join(SENTENCES).encode()
    members = {"a.txt": text, "b/c.txt.gz": gzip.compress(text, mtime=0), "d" * 120: b"long name"}
    tars = [
        _tar(members, format=kind)
        for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        if kind != tarfile.USTAR_FORMAT or members.pop("d" * 120)
    ]
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    packed = [
        gzip.compress(text, mtime=0),
        bz2.compress(text),
        lzma.compress(text),
        bytes(pa.compress(text, "zstd", asbytes=True)),
        bytes(pa.compress(text, "lz4", asbytes=True)),
        lzma.compress(text, lzma.FORMAT_ALONE),
        b"\x50\x2a\x4d\x18\4\0\0\0size" + bytes(pa.compress(text, "zstd", asbytes=True)),  # as pzstd
    ]
    return [
        *tars,
        *(_zip(members, method) for method in methods),
        *packed,
        packed[0] * 2,
        _zip({"in.zip": _zip(members, zipfile.ZIP_DEFLATED), "in.tar": tars[0]}, zipfile.ZIP_STORED),
        gzip.compress(tars[-1], mtime=0),
        lzma.compress(tars[0]),
    ]


# The tokenizer's folder


def _tokenizer_folder(folder: Path) -> Path:
    train_tokenizer(["the cat sat on the mat, the dog sat on the log"] * 3, 262).save(folder / "tokenizer")
    return folder / "tokenizer"


def _tokenizer_seeds(name: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        content = (_tokenizer_folder(folder) / name).read_bytes()
        if name == RANKS:  # single bytes are required; a few more lines are enough to change
            return [content, content[:100], base64.b64encode(b"a") + b" 0\n"]
        return [content]

    return seeds


def _tokenizer(name: str) -> Callable[[bytes], None]:
    def execute(content: bytes) -> None:
        Path("tokenizer", name).write_bytes(content)
        tokenizer = Tokenizer.load(Path("tokenizer"))
        tokenizer.decode(tokenizer.encode_documents([SENTENCES[0], "<|endoftext|> 123"]).tolist())

    return execute


# Model folders


def _small_model(folder: Path) -> Path:
    shape = {"n_embd": 8, "n_inner": 8, "n_layer": 1, "n_head": 2, "n_kv_head": 1}
    with new_folder(folder / "gpt", {}) as new:
        weights = dict(tiny.network(20, **shape).named_parameters())
        save_model(new.path, tiny.model_params(**shape), 20, 19, weights)
    return folder / "gpt"


def _model_seeds(name: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        made = _small_model(folder)
        if name == "model.safetensors.index.json":
            (made / WEIGHTS).rename(made / "part.safetensors")
            return [
                json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "part.safetensors"}}).encode()
            ]
        content = (made / name).read_bytes()
        if name == CONFIG:
            config = json.loads(content)
            gpt2 = {**config, "model_type": "gpt2", "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
            rope = {**config, "rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}
            return [content, json.dumps(gpt2).encode(), json.dumps(rope).encode()]
        return [content]

    return seeds


def _model(name: str) -> Callable[[bytes], None]:
    def execute(content: bytes) -> None:
        Path("gpt", name).write_bytes(content)
        load_model(Path("gpt"))

    return execute


def _hub_tokenizer_seeds(folder: Path) -> list[bytes]:
    (folder / "base").mkdir()
    tokenizer = Tokenizer.load(_tokenizer_folder(folder))
    return [json.dumps(to_tokenizer_json(tokenizer)).encode(), b'{"model": {"vocab": {"a": 0}}}']


@cache
def _sound_tokenizer() -> Tokenizer:
    return Tokenizer.load(Path("tokenizer"))


def _hub_tokenizer(content: bytes) -> None:
    Path("base", "tokenizer.json").write_bytes(content)
    check_same_tokens(_sound_tokenizer(), Path("base"))


# Checkpoints and the split

_SMALL = {"model__n_embd": 8, "model__n_inner": 8, "model__n_layer": 1}
_STEP = Path("checkpoints", "step-00000001")


def _checkpoint_seeds(name: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        state, _, _ = tiny.trained_state(1, **_SMALL)
        checkpoints = Checkpoints(folder / "checkpoints", {"threads": 1})
        state.add_validation(3.5, 1.0)
        state.journal.append(
            (1, 1_700_000_000_000, {"train/loss": 3.0, "train/grad_norm": 1.0, "train/lr": 0.1})
        )
        state.journal.append((1, 1_700_000_000_000, {f"val/{name}": 3.5 for name in VALIDATION_METRICS}))
        checkpoints.save_best(state.model, 1)
        checkpoints.save(state)
        return [(folder / _STEP / name).read_bytes()]

    return seeds


def _checkpoint(name: str) -> Callable[[bytes], None]:
    def execute(content: bytes) -> None:
        _STEP.joinpath(name).write_bytes(content)
        _sign(_STEP, name)
        state, _, _ = tiny.trained_state(0, **_SMALL)
        checkpoints = Checkpoints(Path("checkpoints"), {"threads": 1})
        checkpoints.restore(state, allow_inexact=True)
        assert all(isinstance(step, int) for step, _, _ in state.journal)

    return execute


def _stream_seeds(folder: Path) -> list[bytes]:
    (folder / "val").mkdir()
    schema = [("id", pa.string()), ("source", pa.string())]
    numbers = [(name, pa.int64()) for name in ("offset", "n_tokens", "n_bytes")]
    rows = pa.table(
        {"id": ["a" * 64], "source": ["text"], "offset": [0], "n_tokens": [5], "n_bytes": [9]},
        schema=pa.schema([*schema, *numbers]),
    )
    pq.write_table(rows, folder / "val" / "documents.parquet")
    seeds = []
    for array in (np.arange(5, dtype=np.uint16), np.arange(5, dtype=np.uint32)):
        file = io.BytesIO()
        np.save(file, array)
        seeds.append(file.getvalue())
    (folder / "val" / "tokens.npy").write_bytes(seeds[0])
    return seeds


def _stream(content: bytes) -> None:
    Path("val", "tokens.npy").write_bytes(content)
    stream = open_stream(Path(), "val")
    np.asarray(stream.tokens).astype(np.int64).sum()


# What a training leaves outside of its folders


def _outbox_seeds(_: Path) -> list[bytes]:
    description = {
        "name": None,
        "tags": {"changed": "train.lr=1e-4"},
        "params": {"train.lr": "0.1"},
        "datasets": [
            {"name": "split/val", "digest": "0" * 36, "source_type": "local", "source": "a", "profile": "{}"}
        ],
        "texts": {"lineage.json": "{}"},
    }
    operations = [
        ("create", description),
        ("metrics", [("train/loss", 3.5, 1_700_000_000_000, 1), ("train/lr", 0.1, 1_700_000_000_000, 1)]),
        ("text", ["samples.json", "{}"]),
        ("tags", {"best_step": "1"}),
        ("end", "FINISHED"),
    ]
    lines = [json.dumps(operation).encode() + b"\n" for operation in operations]
    return [b"".join(lines), *lines]


class _Writer:
    """Accepts the same arguments as MLflow's entities, without a store, which takes a second for each run."""

    run_id = "0" * 32

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, operation: Any) -> None:
        from mlflow.entities import Dataset, Metric, Param, RunTag

        kind, content = operation
        match kind:
            case "create":
                made = [Param(key, value) for key, value in content["params"].items()]
                made += [RunTag(key, value) for key, value in content["tags"].items()]
                made += [Dataset(**data) for data in content["datasets"]]
                made += [text.encode() for text in content["texts"].values()]
            case "metrics":
                made = [Metric(*row) for row in content]
            case "text":
                name, text = content
                made = [Path(name).parts, text.encode()]
            case "tags":
                made = [RunTag(key, value[:5000]) for key, value in content.items()]
            case "end":
                made = [{"FINISHED": 1, "FAILED": 2, "KILLED": 3}[content]]
        for each in made:
            str(each)


def _outbox(content: bytes) -> None:
    from gptpipe.record import outbox

    outbox.RunWriter = _Writer  # type: ignore[assignment,misc]
    folder = Path(".gptpipe", "outbox")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        outbox.with_checksum(line) + b"\n" for line in content.splitlines()
    ]  # otherwise only the checksum would be tested
    (folder / f"{'0' * 32}.jsonl").write_bytes(b"".join(lines))
    outbox.send_outbox()


JSON = (mutations.json_tree,)
SEALED = (mutations.sealed, mutations.sealed, mutations.json_tree)
TARGETS = [
    Target("params", 8, _params_seeds, _params, (ConfigError,), (mutations.yaml_lines, mutations.json_tree)),
    Target("manifest", 180, _manifest_seeds, _manifest, (IntegrityError,), SEALED),
    Target("done-note", 60, _done_seeds, _done, (), SEALED),
    Target("text", 100, _text_seeds, lambda c: _read(c, kind="text"), (InputError,)),
    Target("jsonl", 120, _jsonl_seeds, lambda c: _read(c, kind="jsonl"), (InputError,), JSON),
    Target(
        "archive",
        130,
        _archive_seeds,
        lambda c: _read(c, kind="text"),
        (InputError,),
        (mutations.tar_checksum, mutations.inside_compression),
    ),
    Target(
        "parquet",
        70,
        _parquet_seeds,
        _parquet,
        (InputError,),
        (mutations.footer,),
        512 << 20,
        guarded=_read_in_worker,
    ),
    Target("parquet-process", 2, _parquet_seeds, _read_in_worker, (InputError,), (mutations.footer,)),
    Target("tokenizer-encoding", 50, _tokenizer_seeds(ENCODING), _tokenizer(ENCODING), (IntegrityError,), JSON),
    Target("tokenizer-ranks", 50, _tokenizer_seeds(RANKS), _tokenizer(RANKS), (IntegrityError,)),
    Target("hub-tokenizer", 20, _hub_tokenizer_seeds, _hub_tokenizer, (InputError, ConfigError), JSON),
    Target("model-config", 50, _model_seeds(CONFIG), _model(CONFIG), (InputError, IntegrityError), JSON),
    Target(
        "model-weights",
        40,
        _model_seeds(WEIGHTS),
        _model(WEIGHTS),
        (InputError, IntegrityError),
        (mutations.safetensors_header,),
    ),
    Target(
        "model-index",
        40,
        _model_seeds("model.safetensors.index.json"),
        _model("model.safetensors.index.json"),
        (InputError, IntegrityError),
        JSON,
    ),
    Target(
        "checkpoint-state",
        12,
        _checkpoint_seeds("state.json"),
        _checkpoint("state.json"),
        (IntegrityError,),
        JSON,
    ),
    Target(
        "checkpoint-journal",
        12,
        _checkpoint_seeds("journal.jsonl"),
        _checkpoint("journal.jsonl"),
        (IntegrityError,),
        JSON,
    ),
    Target(
        "checkpoint-tensors",
        12,
        _checkpoint_seeds("state.safetensors"),
        _checkpoint("state.safetensors"),
        (IntegrityError,),
        (mutations.safetensors_header,),
    ),
    Target("outbox", 24, _outbox_seeds, _outbox, (), JSON),
    Target("token-stream", 40, _stream_seeds, _stream, (IntegrityError,), (mutations.npy_header,)),
]

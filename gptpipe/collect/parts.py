"""Divides the sources into parts, which worker processes read.

A part is a byte range of a large file, a group of small files, a shard of a dataset, or all of a Python
package. It depends on the input only, never on the number of workers.
"""

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from gptpipe.base.code import code_digest
from gptpipe.base.files import sha256_of, to_json
from gptpipe.base.parallel import map_in_order
from gptpipe.collect.downloads import download
from gptpipe.collect.file_kinds import is_other_file
from gptpipe.collect.open_files import remote_addresses
from gptpipe.collect.params import CollectParams, HuggingFace, Jsonl, Parquet, Python, Source, Text, Url
from gptpipe.collect.paths import is_file_name, matching_files, place_of
from gptpipe.collect.python_text import module_files
from gptpipe.collect.ranges import can_be_divided
from gptpipe.collect.readers import n_dataset_shards, needs_worker
from gptpipe.collect.tables import is_remote, read_errors

PART_BYTES = 32 << 20  # of a large file in a part; about, of small files in a group
_MAX_FILES = 4096  # in a group
_HASHED_HERE = 64 << 20  # bytes; more are hashed by worker processes, which take a while to start


class Part(NamedTuple):
    """One piece of work: where its texts are, and which name its candidates have on disk."""

    source: int  # index in `collect.sources`
    name: str  # digest of everything that determines the candidates
    addresses: tuple[str, ...] = ()  # files, in order
    start: int = 0  # first byte of the file; for a dataset, the number of the shard
    end: int | None = None  # the byte after the last; None: the end of the file
    n_bytes: int = 0  # about, of the input
    is_remote: bool = False  # may have changed since an interrupted run, so its candidates are not reused
    more: int = 1  # factor of the limit where reading stops early

    def with_higher_limit(self) -> "Part":
        return self._replace(more=4 * self.more, name=f"{self.name}x")

    @property
    def title(self) -> str:
        """Its files, for messages."""
        if not self.addresses:
            return f"source {self.source + 1}"
        n_others = len(self.addresses) - 1
        return self.addresses[0] + (f" and {n_others} more" if n_others else "")

    @staticmethod
    def first_name(name: str) -> str:
        """The name before `with_higher_limit`."""
        return name.rstrip("x")


class SourceFiles(NamedTuple):
    """What the sources consist of."""

    digests: dict[str, str]  # name -> SHA-256 of each local file, a revision, or the version of Python
    paths: list[list[str]]  # for each source: its local files, sorted
    others: list[list[str]]  # for each source: files that a glob matches and that have another format


def find_files(sources: tuple[Source, ...]) -> SourceFiles:
    """Find and hash the local files of the sources.

    Raises one InputError for all files that cannot be read.
    """
    # Reports all problems at once.
    matching_files(pattern for source in sources for pattern in _local_patterns(source))
    divided = [_files_of(source) for source in sources]
    paths = [files for files, _ in divided]
    return SourceFiles(_digests(sources, paths), paths, others=[others for _, others in divided])


def _files_of(source: Source) -> tuple[list[str], list[str]]:
    """The local files of a source, and those that its globs match although they have another format."""
    if not isinstance(source, Text | Jsonl | Parquet):
        return [], []
    patterns = _local_patterns(source)
    named = {place_of(pattern) for pattern in patterns if is_file_name(pattern)}
    matched = map(str, matching_files(patterns))
    is_other = {path: is_other_file(path, source.format) and place_of(path) not in named for path in matched}
    return [path for path in is_other if not is_other[path]], [path for path in is_other if is_other[path]]


def printable_name(path: str) -> str:
    """The name of a file in a manifest. Bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _local_patterns(source: Source) -> list[str]:
    if isinstance(source, Text | Jsonl | Parquet):
        return [pattern for pattern in source.paths if not is_remote(pattern)]
    return []


def _digests(sources: tuple[Source, ...], paths: list[list[str]]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for source in sources:
        name = _name_of_digest(source)
        match source:
            case Python(package=None):
                digests[name] = f"{platform.python_implementation()} {platform.python_version()}"
            case Python(package=str(package)):
                digests[name] = _digest_of(module_files(package))
            case HuggingFace():
                folder = Path(source.dataset)
                digests[name] = _digest_of_folder(folder) if source.is_local else str(source.revision)
            case Url():
                digests[name] = source.sha256
    local = sorted({path for paths_of_source in paths for path in paths_of_source})
    for path, digest in zip(local, _sha256_of_all(local), strict=True):
        digests[printable_name(path)] = digest
    return digests


def _name_of_digest(source: Source) -> str:
    """The name of the digest of a whole source; "" for one whose files have digests of their own."""
    match source:
        case Python():
            return source.kind + (f" {source.package}" if source.package else "")
        case HuggingFace():
            return source.address
        case Url():
            return source.url
        case _:
            return ""


def _sha256_of_all(paths: list[str]) -> list[str]:
    is_small = sum(Path(path).stat().st_size for path in paths) < _HASHED_HERE
    return list(map_in_order(_sha256, paths, small=is_small))


def _sha256(path: str) -> str:
    with read_errors(path):
        return sha256_of(Path(path))


def _digest_of(files: list[Path]) -> str:
    return hashlib.sha256("".join(_sha256_of_all(list(map(str, files)))).encode()).hexdigest()


def _digest_of_folder(folder: Path) -> str:
    """The digest of names and contents: `datasets` derives the split of a file from its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [printable_name(str(path.relative_to(folder))) for path in files]
    return hashlib.sha256(to_json([names, _digest_of(files)])).hexdigest()


def plan_parts(params: CollectParams, files: SourceFiles) -> list[Part]:
    """The parts of all sources, in order."""
    code = [code_digest("collect"), platform.python_version(), version("pyarrow"), version("rensa")]
    shared = [code, params.model_dump(exclude={"sources"})]
    n_same = Counter[str]()
    parts: list[Part] = []
    for i, source in enumerate(params.sources):
        for part in _parts_of(source, files.paths[i], params):
            names = [printable_name(address) for address in part.addresses]
            digests = [files.digests.get(name) for name in names or [_name_of_digest(source)]]
            determinants = [
                source.model_dump(exclude={"paths", "license"}),
                names,
                digests,
                part.start,
                part.end,
            ]
            name = hashlib.sha256(to_json([shared, determinants])).hexdigest()[:16]
            n_same[name] += 1
            if n_same[name] > 1:  # the same file in two equal sources
                name = f"{name}-{n_same[name]}"
            parts.append(part._replace(source=i, name=name))
    return parts


def _parts_of(source: Source, paths: list[str], params: CollectParams) -> Iterator[Part]:
    match source:
        case Python():
            yield Part(0, "")
        case HuggingFace():
            n_shards = n_dataset_shards(source)
            yield from (Part(0, "", start=shard, end=n_shards) for shard in range(n_shards))
        case Url():
            yield from _parts_of_files([str(download(source.url, source.sha256))], source, params)
        case _:
            yield from _parts_of_files(paths, source, params)
            remote = {address for path in source.paths if is_remote(path) for address in remote_addresses(path)}
            yield from (Part(0, "", (address,), is_remote=True) for address in sorted(remote))


def _parts_of_files(paths: list[str], source: Source, params: CollectParams) -> Iterator[Part]:
    group: list[str] = []
    n_bytes = 0  # of the group
    for path in paths:
        size = Path(path).stat().st_size
        is_large = size > PART_BYTES and can_be_divided(path, source, params, PART_BYTES)
        is_full = n_bytes + size > PART_BYTES or len(group) == _MAX_FILES
        # If a parser crashes, the part names its file.
        if group and (is_large or is_full or needs_worker(source)):
            yield Part(0, "", tuple(group), n_bytes=n_bytes)
            group, n_bytes = [], 0
        if is_large:
            starts = range(0, size, PART_BYTES)
            for start in starts:
                end = None if start == starts[-1] else start + PART_BYTES
                yield Part(0, "", (path,), start, end, min(size - start, PART_BYTES))
        else:
            group.append(path)
            n_bytes += size
    if group:
        yield Part(0, "", tuple(group), n_bytes=n_bytes)

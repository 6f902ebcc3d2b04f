"""Manifests: they are read as written, and every changed byte is detected."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptpipe.base.manifest import MANIFEST, new_folder, read_manifest, verify
from gptpipe.shell.errors import IntegrityError

names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=12
).filter(lambda name: not name.startswith(".") and name != MANIFEST and len(name.encode()) < 100)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
ancestors = st.dictionaries(st.text(max_size=8), digests, max_size=4)
contents = st.dictionaries(names, st.binary(max_size=200), min_size=1, max_size=4)


def build(folder: Path, files: dict[str, bytes], made_from: dict[str, str], counts: dict[str, Any]) -> Path:
    with new_folder(folder, made_from) as new:
        for name, content in files.items():
            (new.path / name).write_bytes(content)
        new.counts = counts
    return folder


@given(contents, ancestors, st.dictionaries(st.text(max_size=8), plain, max_size=4))
def test_a_manifest_is_read_as_written(
    files: dict[str, bytes], made_from: dict[str, str], counts: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = build(Path(name, "made"), files, made_from, counts)
        manifest = verify(folder)
        assert manifest == read_manifest(folder)
        assert (manifest.made_from, manifest.counts) == (made_from, counts)
        assert {path: manifest.files[path].n_bytes for path in manifest.files} == {
            path: len(content) for path, content in files.items()
        }
        assert manifest.to_bytes() == (folder / MANIFEST).read_bytes()


@given(
    contents.filter(lambda files: any(files.values())), st.randoms(use_true_random=False), st.integers(1, 255)
)
@settings(max_examples=60)
def test_every_changed_byte_of_a_file_is_detected(files: dict[str, bytes], random: Any, change: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = build(Path(name, "made"), files, {"raw": "a" * 64}, {"documents": 3})
        path = folder / random.choice(sorted(name for name, content in files.items() if content))
        damaged = bytearray(path.read_bytes())
        damaged[random.randrange(len(damaged))] ^= change
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="differs from its manifest"):
            verify(folder)

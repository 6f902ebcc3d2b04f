"""Compressed formats: what is recognized, and what comes out."""

import bz2
import gzip
import io
import lzma
import tracemalloc
from functools import partial

import pyarrow as pa
import pytest

from gptpipe.collect import compression
from gptpipe.collect.compression import decompressor
from gptpipe.collect.streams import buffered, drain
from gptpipe.shell.errors import InputError

TEXT = b"".join(b"line %d of some text\n" % i for i in range(20_000))
MIB = 1 << 20


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def lz4(data: bytes) -> bytes:
    return bytes(pa.compress(data, "lz4", asbytes=True))


def skippable(content: bytes, kind: int = 0) -> bytes:
    return bytes([0x50 + kind]) + b"\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


def with_window(frame: bytes, log: int) -> bytes:
    """The frame of `zstd` with a window of 2**log bytes. The header of a single segment names no window."""
    is_single_segment = frame[4] & 0x20 != 0
    n_old = (1, 2, 4, 8)[frame[4] >> 6] if is_single_segment else (1, 3, 5, 9)[frame[4] >> 6]
    return frame[:4] + b"\0" + bytes([(log - 10) << 3]) + frame[5 + n_old :]


def unpack(data: bytes) -> bytes:
    """The content of a file, or b"plain" if it is not compressed."""
    file = buffered("file", io.BytesIO(data), lambda _: None)
    make = decompressor(file.peek())
    return buffered("file", make("file", file), lambda _: None).read() if make else b"plain"


PACKED = {
    "gzip": gzip.compress(TEXT),
    "bzip2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "lzma": lzma.compress(TEXT, lzma.FORMAT_ALONE),
    "zstd": zstd(TEXT),
    "zstd with a window of 2 GiB": with_window(zstd(TEXT), 31),
    "two frames of zstd with different windows": with_window(zstd(TEXT[:5000]), 31) + zstd(TEXT[5000:]),
    "pzstd": skippable(b"\0\1\2\3")
    + zstd(TEXT[:5000])
    + skippable(b"size", 15)
    + zstd(TEXT[5000:])
    + skippable(b""),
    "zstd after a long skippable frame": skippable(bytes(MIB)) + zstd(TEXT),
    "lz4": lz4(TEXT),
    "two frames of lz4": lz4(TEXT[:5000]) + lz4(TEXT[5000:]),
    "lz4 after a skippable frame": skippable(b"about") + lz4(TEXT),
    "empty gzip": gzip.compress(b""),
    "empty bzip2": bz2.compress(b""),
    "empty zstd": zstd(b""),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_compressed_file_is_recognized_and_unpacked(name: str) -> None:
    assert unpack(PACKED[name]) == (b"" if name.startswith("empty") else TEXT)


@pytest.mark.parametrize("name", [name for name in PACKED if not name.startswith("empty") and name != "pzstd"])
@pytest.mark.parametrize("n_missing", [1, 5, 1000])
def test_a_truncated_file_is_an_error(name: str, n_missing: int) -> None:
    with pytest.raises(InputError, match=r"file: (damaged, truncated or encrypted|cannot read): "):
        unpack(PACKED[name][:-n_missing])


@pytest.mark.parametrize("name", ["lzma", "zstd", "lz4"])
def test_garbage_after_the_content_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=r"file: (damaged, truncated or encrypted|cannot read): "):
        unpack(PACKED[name] + b"garbage")


@pytest.mark.parametrize(
    "text",
    [
        b"BZh is how a bzip2 file starts.",
        b"BZh91AY is close",
        b"PK is a magic number.",
        b"7z and Rar! are archives.",
        b"\x1f\x8b\x08\xffreserved bits of gzip",
        b"\x04\x22\x4d\x18 text after the magic number of LZ4",
        b"]\0\0\x80\0" + b" no size" + b"\0 of lzma",
        b"]\1\2\3\0" + b"\xff" * 8 + b"\0a dictionary that no program writes",
        b"P*M",
        b"",
    ],
)
def test_a_text_that_starts_with_a_magic_number_is_not_compressed(text: bytes) -> None:
    """A text that started with BZh was once reported as a damaged file."""
    assert unpack(text) == b"plain"


def test_a_window_that_is_too_large_is_an_error_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more content than the window that is used instead, matches may lie further back."""
    monkeypatch.setattr(compression, "_ZSTD_WINDOW", MIB)
    monkeypatch.setattr(compression, "_ZSTD_WINDOW_DESCRIPTOR", bytes([(20 - 10) << 3]))
    assert len(unpack(with_window(zstd(bytes(MIB)), 31))) == MIB
    words = (
        "file: needs a window of 2,048 MiB to unpack, above 1; unpack it with `zstd -d --long=31`, and pack it"
    )
    with pytest.raises(InputError, match=words):
        unpack(with_window(zstd(bytes(MIB + 1)), 31))
    assert len(unpack(zstd(bytes(MIB + 1)))) == MIB + 1  # a single segment


def _add_size(sizes: list[int], data: bytes) -> None:
    sizes.append(len(data))


def test_unpacking_takes_little_memory() -> None:
    """Content of 16 MiB in a small file; pyarrow's own memory is not traced, but is a few blocks."""
    for data in (lzma.compress(bytes(16 * MIB), lzma.FORMAT_ALONE, preset=0), lz4(bytes(16 * MIB))):
        file = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]
        make = decompressor(file.peek())
        assert make
        sizes: list[int] = []
        tracemalloc.start()
        try:
            drain(buffered("file", make("file", file), partial(_add_size, sizes)))
            assert sum(sizes) == 16 * MIB
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()

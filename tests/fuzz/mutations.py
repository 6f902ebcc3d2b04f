"""Changes of bytes that often break parsers. The result depends only on the content and the generator."""

import bz2
import gzip
import io
import json
import lzma
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pyarrow as pa

from gptpipe.base.files import seal

Mutation = Callable[[bytes, Random], bytes]

LONGEST = 1 << 17  # bytes of an input; longer ones take more time and hardly find more
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    63,
    64,
    127,
    128,
    255,
    256,
    511,
    1000,
    4096,
    32767,
    32768,
    65535,
    65536,
    2**20,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**70,
    10**12,
    10**30,
)
_TOKENS = (
    b"\0",
    b"\n",
    b"\r\n",
    b"\x1b[31m",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"..",
    b"/",
    b"../../x",
    b"/etc/passwd",
    b"%s",
    b"{{1}}",
    b"<|endoftext|>",
    b"null",
    b"true",
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e999",
    b"0x10",
    b"[]",
    b"{}",
    b'"',
    b"'",
    b"\\",
    b"\\ud800",
    b"\\u0000",
    b"&a",
    b"*a",
    b"!!python/name:os.system",
    b"<<: *a",
    b"(a+)+$",
    b"(?=",
    b"(",
    b"\\p{Xx}",
    b"-",
    b" ",
    b"\t",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    -0.0,
    0.5,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\0",
    "\n",
    "\x1b[31m",
    "\ud800",
    "..",
    "../x",
    "/etc/passwd",
    "(a+)+$",
    "(",
    "default",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"": {}},
    [0] * 300,
    "x" * 5000,
    *_NUMBERS,
)


def mutate(content: bytes, corpus: Sequence[bytes], special: Sequence[Mutation], random: Random) -> bytes:
    """Make one to eight changes of `content`; half of them know its format."""
    for _ in range(1 << random.randrange(4)):
        if special and random.random() < 0.5:
            content = random.choice(special)(content, random)
        elif random.random() < 0.1:
            content = _splice(content, random.choice(corpus), random)
        else:
            content = random.choice(_GENERIC)(content, random)
        content = content[:LONGEST]
    return content


def _part(content: bytes, random: Random, longest: int = 64) -> tuple[int, int]:
    """Start and end of a part, more often short than long."""
    start = random.randrange(len(content) + 1)
    length = random.choice((1, 2, 4, 8, random.randrange(1, longest), random.randrange(1, len(content) + 2)))
    return start, min(len(content), start + length)


def _splice(content: bytes, other: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)] + other[random.randrange(len(other) + 1) :]


def _flip_bit(content: bytes, random: Random) -> bytes:
    if not content:
        return content
    i = random.randrange(len(content))
    return content[:i] + bytes([content[i] ^ 1 << random.randrange(8)]) + content[i + 1 :]


def _set_byte(content: bytes, random: Random) -> bytes:
    i = random.randrange(len(content) + 1)
    return content[:i] + bytes([random.randrange(256)]) + content[i + 1 :]


def _insert(content: bytes, random: Random) -> bytes:
    i = random.randrange(len(content) + 1)
    new = random.choice((random.choice(_TOKENS), random.randbytes(random.randrange(1, 16))))
    return content[:i] + new + content[i:]


def _replace(content: bytes, random: Random) -> bytes:
    start, end = _part(content, random)
    return content[:start] + random.choice(_TOKENS) + content[end:]


def _delete(content: bytes, random: Random) -> bytes:
    start, end = _part(content, random)
    return content[:start] + content[end:]


def _truncate(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _repeat(content: bytes, random: Random) -> bytes:
    start, end = _part(content, random)
    times = random.choice((2, 3, 10, 100, 1000, 30_000))
    return content[:end] + content[start:end] * min(times, LONGEST // max(1, end - start)) + content[end:]


def _move(content: bytes, random: Random) -> bytes:
    start, end = _part(content, random)
    rest, i = content[:start] + content[end:], random.randrange(len(content) + 1)
    return rest[:i] + content[start:end] + rest[i:]


def _set_integer(content: bytes, random: Random) -> bytes:
    size, order = random.choice((1, 2, 4, 8)), random.choice(("little", "big"))
    number = random.choice(_NUMBERS) * random.choice((1, 1, -1)) % 256**size
    i = random.randrange(len(content) + 1)
    return content[:i] + number.to_bytes(size, order) + content[i + size :]  # type: ignore[arg-type]


def _set_number(content: bytes, random: Random) -> bytes:
    """Replace decimal digits by another number."""
    digits = [i for i, byte in enumerate(content[:4096]) if 48 <= byte < 58]
    if not digits:
        return content
    start = end = random.choice(digits)
    while start and 48 <= content[start - 1] < 58:
        start -= 1
    while end < len(content) and 48 <= content[end] < 58:
        end += 1
    return (
        content[:start] + str(random.choice(_NUMBERS) * random.choice((1, 1, 1, -1))).encode() + content[end:]
    )


_GENERIC: tuple[Mutation, ...] = (
    *(
        _flip_bit,
        _flip_bit,
        _set_byte,
        _insert,
        _replace,
        _delete,
        _truncate,
        _repeat,
        _move,
        _set_integer,
        _set_number,
    ),
)


def json_tree(content: bytes, random: Random) -> bytes:
    """Change a value, a key or the structure of a JSON document, or of one line of JSON lines."""
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    for text, before, after in ((content, b"", b""), (lines[at], *_around(lines, at))):
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if random.random() < 0.05:
            deep = random.choice((50, 1000, 20_000))
            brackets = random.choice((("[", "]"), ('{"a":', "}")))
            changed = (brackets[0] * deep + "1" + brackets[1] * deep).encode()
        else:
            try:
                changed = _dump(_changed(tree, random), random)
            # json.dumps has less room than json.loads; a long integer has no float, and maybe no string.
            except (RecursionError, OverflowError, ValueError):
                return content
        return before + changed + after
    return content


def sealed(content: bytes, random: Random) -> bytes:
    """Change a sealed JSON document, and seal it again."""
    try:
        tree = json.loads(content)
        tree.pop("sha256", None)
        return seal(_changed(tree, random))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return content


def _around(lines: list[bytes], at: int) -> tuple[bytes, bytes]:
    before = b"".join(line + b"\n" for line in lines[:at])
    after = b"".join(b"\n" + line for line in lines[at + 1 :])
    return before, after


def _dump(tree: Any, random: Random) -> bytes:
    text = json.dumps(tree, ensure_ascii=random.random() < 0.5)
    return text.encode(errors="surrogatepass")


def _changed(node: Any, random: Random) -> Any:
    """The tree with one node replaced, removed, duplicated, renamed or wrapped."""
    if isinstance(node, dict | list) and node and random.random() < 0.8:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = random.choice(keys)
        new = dict(node) if isinstance(node, dict) else list(node)
        kind = random.randrange(10)
        if kind == 0:
            del new[key]
        elif kind == 1 and isinstance(new, dict):
            new[str(random.choice(_VALUES))] = new.pop(key)
        elif kind == 1:
            new.insert(random.randrange(len(new) + 1), new[key])
        elif kind == 2:
            other = random.choice(keys)
            new[key], new[other] = new[other], new[key]
        else:
            new[key] = _changed(new[key], random)
        return new
    if isinstance(node, int | float) and not isinstance(node, bool) and random.random() < 0.3:
        return random.choice((-node, node + 1, node - 1, node * 2, float(node), str(node)))
    return random.choice((random.choice(_VALUES), random.choice(_VALUES), [node], {"a": node}))


def yaml_lines(content: bytes, random: Random) -> bytes:
    """Change a scalar, the indentation, or the order or number of lines."""
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    key, colon, value = lines[at].partition(b":")
    kind = random.randrange(8)
    if kind < 3 and colon:
        lines[at] = key + b": " + _dump(random.choice(_VALUES), random)
    elif kind == 3:
        lines[at] = b" " * random.randrange(5) + lines[at].lstrip()
    elif kind == 4:
        lines.insert(at, random.choice(lines))
    elif kind == 5:
        del lines[at]
    elif kind == 6 and colon:
        lines[at] = (
            key + b": " + random.choice((b"&a ", b"*a", b"!!int ", b"!!set ", b"| ", b"> ", b"? ")) + value
        )
    else:
        other = random.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    return b"\n".join(lines)


def safetensors_header(content: bytes, random: Random) -> bytes:
    """Change the header, and adjust the length before it."""
    if len(content) < 8:
        return content
    n = int.from_bytes(content[:8], "little")
    header = json_tree(content[8 : 8 + n], random)
    return len(header).to_bytes(8, "little") + header + content[8 + n :]


def npy_header(content: bytes, random: Random) -> bytes:
    """Change type, order or shape, and adjust the length before the header."""
    end = content.find(b"\n", 10)
    if end < 0:
        return content
    header = content[10:end].rstrip()
    change = random.choice(
        (
            (
                b"<u2",
                random.choice(
                    (b"<u4", b"|O", b">u2", b"<f8", b"|S9", b"<U2", b"|V0", b"<M8[s]", b"u2,u2", b"|b1")
                ),
            ),
            (b"False", b"True"),
            (b"(", b"(" + str(random.choice(_NUMBERS)).encode() + b", "),
            (b"shape", random.choice((b"shap", b"descr"))),
        )
    )
    header = _set_number(header, random) if random.random() < 0.4 else header.replace(*change)
    return content[:8] + struct.pack("<H", len(header) + 1 & 0xFFFF) + header + content[end:]


def tar_checksum(content: bytes, random: Random) -> bytes:
    """Change one header of a tar archive, and adjust its checksum."""
    if len(content) < 512:
        return content
    start = 512 * random.randrange(len(content) // 512)
    header = bytearray(random.choice(_GENERIC)(content[start : start + 512], random)[:512].ljust(512, b"\0"))
    if random.random() < 0.5:
        header[156:157] = random.choice(
            (b"0", b"1", b"2", b"5", b"6", b"g", b"x", b"X", b"L", b"K", b"S", b"7", b"\0")
        )
    if random.random() < 0.3:  # the size
        sizes = (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000000000\0", b"-1")
        header[124:136] = random.choice(sizes).ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


def _gunzip(data: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        return file.read(LONGEST)


def _unzstd(data: bytes) -> bytes:
    return bytes(pa.CompressedInputStream(io.BytesIO(data), "zstd").read(LONGEST))


_PACKERS: dict[bytes, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": (_gunzip, lambda data: gzip.compress(data, 1, mtime=0)),
    b"BZh": (lambda data: bz2.BZ2Decompressor().decompress(data, LONGEST), lambda data: bz2.compress(data, 1)),
    b"\xfd7zXZ": (
        lambda data: lzma.LZMADecompressor().decompress(data, LONGEST),
        lambda data: lzma.compress(data, preset=0),
    ),
    b"\x28\xb5\x2f\xfd": (_unzstd, lambda data: bytes(pa.compress(data, "zstd", asbytes=True))),
}


def inside_compression(content: bytes, random: Random) -> bytes:
    """Change the content of a compressed input, and compress it again; sometimes compress another input."""
    for magic, (unpack, pack) in _PACKERS.items():
        if content.startswith(magic):
            try:
                inside = unpack(content)
            except Exception:
                return content
            change = random.choice((tar_checksum, random.choice(_GENERIC)))
            return pack(change(inside, random)[:LONGEST])
    pack = random.choice(list(_PACKERS.values()))[1]
    return pack(content) if random.random() < 0.2 else content


def footer(content: bytes, random: Random) -> bytes:
    """Change the metadata at the end of a Parquet file."""
    if len(content) < 12:
        return content
    length = min(len(content) - 8, int.from_bytes(content[-8:-4], "little"))
    start = len(content) - 8 - length
    mutate_metadata = random.choice((_flip_bit, _set_byte, _set_integer, _delete, _insert, _move))
    metadata = mutate_metadata(content[start:-8], random)
    return content[:start] + metadata + len(metadata).to_bytes(4, "little") + b"PAR1"

"""Byte pair encoding: a tiktoken encoding, or one trained here, stored in tiktoken's own rank-file format."""

import base64
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import get_ident
from typing import Annotated

import numpy as np
import numpy.typing as npt
import tiktoken
import tiktoken_ext.openai_public
from pydantic import BaseModel, ConfigDict, Field

from gptpipe.base.files import read_bytes, read_json, to_json, write_bytes
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, first_line

TOKENIZER = "tokenizer"  # name of its folder, beside the tokens
RANKS = "ranks.tiktoken"
ENCODING = "encoding.json"
END_OF_TEXT = "<|endoftext|>"

# How a trained encoding cuts text before merging: words with a leading space, digits by twos, runs of punctuation.
# GPT-4's pattern (cl100k_base) with shorter numbers, which a small vocabulary cannot afford to keep by threes.
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

# The patterns that a tokenizer folder may name: ours, and those of GPT-2, GPT-4 and GPT-4o. They cut every text into
# pieces that join to the same text. Another pattern may lose text, or make tiktoken panic.
PATTERNS = (
    PATTERN,
    tiktoken_ext.openai_public.r50k_pat_str,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_MAX_RANKS_BYTES = 1 << 26  # about 4 million tokens; o200k_base has 0.2 million
_MAX_ENCODING_BYTES = 1 << 20
_TOO_MUCH_SPACE = re.compile(r"\s{100001}")  # tiktoken panics at a million white characters in a row

_JOINED = 1 << 17  # characters in one call of tiktoken: more cost time for fresh memory


class Tokenizer:
    """Text to token ids and back. Text that spells a special token stays ordinary text."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.pattern: str = encoding._pat_str
        self.special_tokens: dict[str, int] = encoding._special_tokens
        self.ranks: dict[bytes, int] = encoding._mergeable_ranks  # bytes of each ordinary token, with its id
        self._of_thread = {get_ident(): encoding}
        self._bytes_of = {rank: token for token, rank in self.ranks.items()}
        self.dtype = np.dtype(np.uint16 if encoding.n_vocab < 1 << 16 else np.uint32)
        try:
            self.end_of_text = encoding.eot_token
        except KeyError as error:
            raise ConfigError(
                f"tokenize.encoding {encoding.name} has no {END_OF_TEXT} token to close documents with; use another"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. Raises InputError for over 100,000 white characters in a row."""
        if _TOO_MUCH_SPACE.search(text):
            raise InputError("a text with more than 100,000 white characters in a row cannot be encoded; shorten them")
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts: Sequence[str]) -> npt.NDArray[np.unsignedinteger]:
        """Ids of whole documents one behind the other, each closed by the end-of-text token.

        A call for many is much faster than one for each: the token's own text stands between them, and tiktoken
        encodes what lies between special tokens by itself. A document that spells the token needs the other way.
        """
        size = sum(map(len, texts)) + 1
        step = 1 + len(texts) * _JOINED // size
        return np.concatenate([self._encode_joined(texts[i : i + step]) for i in range(0, max(1, len(texts)), step)])

    def _encode_joined(self, texts: Sequence[str]) -> npt.NDArray[np.unsignedinteger]:
        joined = END_OF_TEXT.join([*texts, ""])
        ids = self._encoding_of_thread().encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        if np.count_nonzero(ids == self.end_of_text) > len(texts):
            ids = np.array([i for text in texts for i in (*self.encode(text), self.end_of_text)])
        return ids.astype(self.dtype)

    def _encoding_of_thread(self) -> tiktoken.Encoding:
        """Threads that share one wait for each other at its regular expressions: a third of two threads' time."""
        if (thread := get_ident()) not in self._of_thread:
            self._of_thread[thread] = tiktoken.Encoding(
                self.encoding.name,
                pat_str=self.pattern,
                mergeable_ranks=self.ranks,
                special_tokens=self.special_tokens,
            )
        return self._of_thread[thread]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, as `decode_bytes` has it; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; special tokens, and ids that are no token (cl100k_base has some), have none."""
        return b"".join(self._bytes_of.get(i, b"") for i in ids)

    def save(self, folder: Path) -> None:
        """Write the rank file (a line per token: its bytes in base64, a space, its id) and a small JSON beside it."""
        by_id = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = (base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in by_id)
        write_bytes(folder / RANKS, b"".join(lines))
        description = {"name": self.encoding.name, "pattern": self.pattern, "special_tokens": self.special_tokens}
        write_bytes(folder / ENCODING, to_json(description))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises IntegrityError for a folder that cannot encode and decode every text."""
        try:
            description = read_json(folder / ENCODING, _Description, _MAX_ENCODING_BYTES)
            ranks = _parse_ranks(read_bytes(folder / RANKS, _MAX_RANKS_BYTES))
            _check(description, ranks)
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{folder}: holds no usable tokenizer: {first_line(error)}; make the folder again with `dvc repro -f`"
            ) from error
        return cls(
            tiktoken.Encoding(
                description.name,
                pat_str=description.pattern,
                mergeable_ranks=ranks,
                special_tokens=description.special_tokens,
            )
        )


class _Description(BaseModel):
    """encoding.json."""

    model_config = ConfigDict(extra="forbid")

    name: str
    pattern: str
    special_tokens: dict[str, Annotated[int, Field(ge=0, lt=2**31)]]


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """The tokens of a rank file with their ids. Raises ValueError."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        if not (rank.isdigit() and len(rank) <= 10):
            raise ValueError(f"{RANKS}: line {number} is not a token and its id")
        ranks[base64.b64decode(token, validate=True)] = int(rank)
        if len(ranks) < number:
            raise ValueError(f"{RANKS}: line {number} repeats a token")
    return ranks


def _check(description: _Description, ranks: dict[bytes, int]) -> None:
    """Raises ValueError unless every text can be encoded, and every id means one token."""
    special = description.special_tokens
    ids = {*ranks.values(), *special.values()}
    if description.pattern not in PATTERNS:
        raise ValueError(f"{ENCODING}: the pattern is none that gptpipe knows")
    if END_OF_TEXT not in special:
        raise ValueError(f"{ENCODING}: there is no special token {END_OF_TEXT}")
    if "" in special or b"" in ranks:
        raise ValueError("a token is empty")
    if missing := {bytes([byte]) for byte in range(256)} - ranks.keys():
        raise ValueError(f"{RANKS}: {len(missing)} of the 256 single bytes have no token")
    if len(ids) < len(ranks) + len(special):
        raise ValueError("two tokens have one id")
    if max(ids) >= 2 * len(ids):  # a few ids may be unused, as in cl100k_base; the network has a row for each
        raise ValueError(f"the ids go up to {max(ids):,}, there are {len(ids):,} tokens")


def byte_letters() -> dict[int, str]:
    """A printable character for each byte, as GPT-2 assigns them: its own where Latin-1 has one, else from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

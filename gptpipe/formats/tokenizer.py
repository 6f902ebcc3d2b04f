"""A byte pair encoding, and its folder on disk: data/tokens/tokenizer, copied to data/split and to the model.

`ranks.tiktoken` is tiktoken's own format: one line for each token, its bytes in base64, a space, and its id.
The ids are also the order in which BPE merges. `encoding.json` has the encoding's name, the regular expression
that cuts text into pieces before merging, and the ids of special tokens.
"""

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

TOKENIZER = "tokenizer"  # name of the folder
RANKS = "ranks.tiktoken"
ENCODING = "encoding.json"
END_OF_TEXT = "<|endoftext|>"

# How a trained encoding cuts text into pieces: words with a leading space or sign, single digits, runs of
# punctuation. Combining marks belong to words. This is Qwen 3.5's pattern. llama.cpp knows it as `qwen35`; a
# model with a pattern that it does not know cannot be converted to GGUF.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The patterns of OpenAI's encodings, from tiktoken.
GPT2_PATTERN: str = tiktoken_ext.openai_public.r50k_pat_str
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
GPT4O_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# That of earlier models of this project.
_EARLIER_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# The patterns that are accepted. The pieces of any text join to the same text. Other patterns may lose text, or
# make tiktoken panic.
PATTERNS = (PATTERN, _EARLIER_PATTERN, GPT2_PATTERN, GPT4_PATTERN, GPT4O_PATTERN)

_MAX_RANKS_BYTES = 1 << 26  # about 4 million tokens; o200k_base has 200,000
_MAX_ENCODING_BYTES = 1 << 20
_TOO_MUCH_SPACE = re.compile(r"\s{100001}")  # tiktoken panics at a million whitespace characters in a row

_JOINED = 1 << 17  # characters in one call of tiktoken; larger calls lose time allocating memory


class Tokenizer:
    """Text to token ids and back. Text that spells a special token stays ordinary text."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.pattern: str = encoding._pat_str
        self.special_tokens: dict[str, int] = encoding._special_tokens
        self.ranks: dict[bytes, int] = encoding._mergeable_ranks  # bytes of each ordinary token -> its id
        self._bytes_by_id = {rank: token for token, rank in self.ranks.items()}
        self._encodings = {get_ident(): encoding}  # thread -> its copy
        self.dtype = np.dtype(np.uint16 if encoding.n_vocab < 1 << 16 else np.uint32)
        try:
            self.end_of_text = encoding.eot_token
        except KeyError as error:
            raise ConfigError(
                f"tokenize.encoding {encoding.name} has no {END_OF_TEXT} token to end documents with; "
                "use another one"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of the text without end-of-text. Raises InputError for 100,001 whitespace characters in a row."""
        if _TOO_MUCH_SPACE.search(text):
            raise InputError("cannot encode more than 100,000 whitespace characters in a row; shorten them")
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts: Sequence[str]) -> npt.NDArray[np.unsignedinteger]:
        """Ids of documents one after another, each followed by the end-of-text token.

        Texts are passed to tiktoken joined, since one call for each is much slower.
        """
        n_characters = sum(map(len, texts)) + 1
        n_texts = 1 + len(texts) * _JOINED // n_characters  # of average length
        starts = range(0, max(1, len(texts)), n_texts)
        return np.concatenate([self._encode_joined(texts[start : start + n_texts]) for start in starts])

    def _encode_joined(self, texts: Sequence[str]) -> npt.NDArray[np.unsignedinteger]:
        """Join the texts by the text of the end-of-text token. tiktoken encodes the parts between special
        tokens independently, so each text gets the ids that it has alone, unless one of them contains
        `<|endoftext|>`.
        """
        joined = END_OF_TEXT.join([*texts, ""])
        encoding = self._encoding_of_this_thread()
        ids = encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        if np.count_nonzero(ids == self.end_of_text) > len(texts):
            ids = np.array([i for text in texts for i in (*self.encode(text), self.end_of_text)])
        return ids.astype(self.dtype)

    def _encoding_of_this_thread(self) -> tiktoken.Encoding:
        """One copy for each thread. Two threads that share one wait for each other a third of the time."""
        thread = get_ident()
        if thread not in self._encodings:
            self._encodings[thread] = tiktoken.Encoding(
                self.encoding.name,
                pat_str=self.pattern,
                mergeable_ranks=self.ranks,
                special_tokens=self.special_tokens,
            )
        return self._encodings[thread]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `decode_bytes`; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens. Special tokens have none, nor unused ids, such as some of cl100k_base."""
        return b"".join(self._bytes_by_id.get(i, b"") for i in ids)

    def save(self, folder: Path) -> None:
        """Write the two files."""
        by_id = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = (base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in by_id)
        write_bytes(folder / RANKS, b"".join(lines))
        encoding = {"name": self.encoding.name, "pattern": self.pattern, "special_tokens": self.special_tokens}
        write_bytes(folder / ENCODING, to_json(encoding))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises IntegrityError unless it can encode and decode every text."""
        try:
            content = read_json(folder / ENCODING, _EncodingFile, _MAX_ENCODING_BYTES)
            ranks = _parse_ranks(read_bytes(folder / RANKS, _MAX_RANKS_BYTES))
            _check(content, ranks)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise IntegrityError(
                f"{folder}: contains no usable tokenizer: {reason}; run `dvc repro -f`"
            ) from error
        encoding = tiktoken.Encoding(
            content.name, pat_str=content.pattern, mergeable_ranks=ranks, special_tokens=content.special_tokens
        )
        return cls(encoding)


class _EncodingFile(BaseModel):
    """encoding.json."""

    model_config = ConfigDict(extra="forbid")

    name: str
    pattern: str
    special_tokens: dict[str, Annotated[int, Field(ge=0, lt=2**31)]]


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """Token -> id, from the content of a rank file. Raises ValueError."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        if not (rank.isdigit() and len(rank) <= 10):
            raise ValueError(f"{RANKS}: line {number} is not a token and its id")
        ranks[base64.b64decode(token, validate=True)] = int(rank)
        if len(ranks) < number:
            raise ValueError(f"{RANKS}: line {number} repeats a token")
    return ranks


def _check(content: _EncodingFile, ranks: dict[bytes, int]) -> None:
    """Raise ValueError unless every text can be encoded, and every id has one token."""
    special = content.special_tokens
    ids = {*ranks.values(), *special.values()}
    if content.pattern not in PATTERNS:
        raise ValueError(f"{ENCODING}: gptpipe does not know the pattern")
    if END_OF_TEXT not in special:
        raise ValueError(f"{ENCODING}: there is no special token {END_OF_TEXT}")
    if "" in special or b"" in ranks:
        raise ValueError("a token is empty")
    missing = {bytes([byte]) for byte in range(256)} - ranks.keys()
    if missing:
        raise ValueError(f"{RANKS}: {len(missing)} of the 256 single bytes have no token")
    if len(ids) < len(ranks) + len(special):
        raise ValueError("two tokens have the same id")
    if max(ids) >= 2 * len(ids):  # cl100k_base has a few unused ids; each is a row of the embedding
        raise ValueError(f"the largest id is {max(ids):,}, but there are only {len(ids):,} tokens")


def byte_letters() -> dict[int, str]:
    """GPT-2's printable character for each byte: that of Latin-1 if printable, else one from U+0100 up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

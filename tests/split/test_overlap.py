"""Overlap of held-out text with train, compared with plain sets of words."""

import json
import random
import re
import unicodedata
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sections import side_of, split_params

from gptpipe.collect import parts, shards
from gptpipe.collect.collect import collect
from gptpipe.collect.params import CollectParams
from gptpipe.collect.words import WORD_LENGTH, split_words
from gptpipe.formats.corpus import id_of
from gptpipe.formats.sides import Side
from gptpipe.shell.errors import InputError
from gptpipe.split import overlap
from gptpipe.split.overlap import report_contamination

SEED = 7
FIFTHS: dict[str, Any] = {"val_fraction": 0.2, "test_fraction": 0.2}
RUN = [f"w{i}" for i in range(13)]


@pytest.fixture
def report_on(tmp_path: Path, collect_params: Callable[..., CollectParams]) -> Callable[..., dict[str, Any]]:
    """Collect texts, and return the report about them."""

    def run(texts: list[str], collect_changed: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
        (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = {"kind": "jsonl", "paths": (f"{tmp_path}/corpus.jsonl",)}
        params = collect_params(source, **(collect_changed or {}))
        collect(params, tmp_path / "raw")
        tasks = changed.pop("tasks", {})
        split = split_params(**{**FIFTHS, **changed})
        report_contamination(tmp_path / "raw", tmp_path / "split.json", split, params, SEED, tasks)
        return json.loads((tmp_path / "split.json").read_text())

    return run


def on_side(side: Side, words: list[str]) -> str:
    """A text that is on the given side: these words and a last word that is chosen for it."""
    texts = (" ".join([*words, f"end{i}"]) for i in count())
    return next(text for text in texts if side_of(id_of(text.encode()), split_params(**FIFTHS), SEED) == side)


def plain_words(text: str) -> list[tuple[str, int]]:
    """Words with their lengths in twelfths, one character at a time: the reference for the hashes."""
    words: list[tuple[str, int]] = []
    for match in re.finditer(
        "([ก-ฮ][\u0e31-\u0e3a]*)|([\u4e00-\u9fff])|[^\\W\u0e00-\u0eff\u4e00-\u9fff]+", text.lower()
    ):
        length = 3 if match[1] else 8 if match[2] else 12
        words.append((match[0], length))
    return words


def plain_runs(text: str, n: int) -> tuple[set[str], set[str]]:
    """The n-grams of a text, or the whole text if it has none; and all shorter runs of at least five words."""
    words = plain_words(text)
    ngrams: set[str] = set()
    shorter: set[str] = set()
    for start in range(len(words)):
        length = 0
        for end in range(start, len(words)):
            length += words[end][1]
            run = " ".join(word for word, _ in words[start : end + 1])
            if length >= 12 * n:
                ngrams.add(run)
                break
            shorter |= {run} if length >= 12 * 5 else set()
    whole = " ".join(word for word, _ in words)
    return ngrams or ({whole} & shorter), shorter


def test_counts_equal_those_of_plain_sets_of_words(
    report_on: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts with punctuation and several scripts, some empty; several shards and blocks, two workers."""
    n = 7
    random_ = random.Random(0)
    words = ["The", "cat", "it's", "naïve", "Straße", "漢字", "x_1", "42", "“dog”", "dog", "กี", "กู", "...", "-"]
    texts = [
        random_.choice((" ", "\n", ", ")).join(
            random_.choices(words[: random_.choice((2, 14))], k=random_.randrange(30))
        )
        + random_.choice((f" {i}", "!" * i))
        for i in range(300)
    ]
    texts = list(dict.fromkeys(texts))
    monkeypatch.setattr(shards, "SHARD_BYTES", 9_000)
    monkeypatch.setattr(overlap, "_BLOCK_CHARACTERS", 500)
    sides = {
        id_of(text.encode()): side_of(id_of(text.encode()), split_params(**FIFTHS), SEED) for text in texts
    }
    runs = {id_of(text.encode()): plain_runs(text, n) for text in texts}
    of_train = set().union(*(own | shorter for name, (own, shorter) in runs.items() if sides[name] == "train"))
    held_out = set().union(*(own for name, (own, _) in runs.items() if sides[name] != "train"))
    one_worker = report_on(texts, ngram=n)
    for side in ("train", "val", "test"):
        of_side = [document_id for document_id, on in sides.items() if on == side]
        contaminated = [
            name
            for name in of_side
            if (runs[name][0] | runs[name][1] if side == "train" else runs[name][0])
            & (held_out if side == "train" else of_train)
        ]
        examined = [name for name in of_side if any(runs[name])]
        assert 3 < len(contaminated) < len(examined) - 3 < len(of_side) - 6
        assert one_worker[f"{side}_documents"] == len(of_side)
        assert one_worker[f"{side}_examined"] == len(examined)
        assert one_worker[f"{side}_contaminated"] == len(contaminated)
        assert one_worker["share"][side] == len(contaminated) / len(examined)
        assert side == "train" or one_worker["ids"][side] == contaminated[:20]
        assert side == "train" or one_worker["unlisted"][side] == max(0, len(contaminated) - 20)
    monkeypatch.setenv("GPTPIPE_WORKERS", "2")
    assert report_on(texts, ngram=n) == one_worker


def test_thirteen_shared_words_overlap_in_any_case_and_twelve_do_not(
    report_on: Callable[..., dict[str, Any]],
) -> None:
    loud = [word.upper() + "," for word in RUN]
    train, val, test = on_side("train", ["a", *RUN]), on_side("val", [*loud]), on_side("test", ["b", *RUN[:12]])
    report = report_on([train, val, test])
    assert {name: report[name] for name in sorted(report) if name.endswith("_examined")} == {
        "test_examined": 1,
        "train_examined": 1,
        "val_examined": 1,
    }
    assert report["share"] == {"test": 0.0, "train": 1.0, "val": 1.0}
    assert report["ids"] == {"val": [id_of(val.encode())]}
    assert report_on([train, val, test], ngram=12)["share"] == {"test": 1.0, "train": 1.0, "val": 1.0}


def test_a_run_of_words_ends_with_its_document(report_on: Callable[..., dict[str, Any]]) -> None:
    halves = [on_side("train", RUN[:7]).removesuffix(" end0"), on_side("train", RUN[7:])]
    assert report_on([*halves, on_side("val", RUN)])["share"] == {"train": 0.0, "val": 0.0}


def write_benchmark(folder: Path, questions: list[Any], key: str = "q") -> dict[str, Any]:
    (folder / "questions.jsonl").write_text("".join(json.dumps({key: text}) + "\n" for text in questions))
    return {"kind": "jsonl", "paths": (f"{folder}/questions.jsonl",), "text_key": "q"}


def test_benchmarks_are_examined_and_a_share_above_the_limit_is_an_error(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]]
) -> None:
    benchmark = write_benchmark(
        tmp_path, [" ".join(RUN), "too short", None, " ".join(f"other{i}" for i in range(20))]
    )
    texts = [on_side("train", ["a", *RUN]), on_side("val", [f"v{i}" for i in range(20)])]
    report = report_on(texts, benchmarks=(benchmark,), max_contamination=0.5)
    n_documents, n_examined = report["benchmark-0_documents"], report["benchmark-0_examined"]
    assert (n_documents, n_examined, report["benchmark-0_rejected"]) == (3, 2, 1)
    assert report["share"] == {"benchmark-0": 0.5, "train": 1.0, "val": 0.0}
    assert report["ids"] == {"benchmark-0": ["item 1"]}
    assert report["benchmarks"] == {"benchmark-0": f"jsonl {tmp_path}/questions.jsonl"}
    with pytest.raises(InputError) as caught:
        report_on(texts, benchmarks=(benchmark,), max_contamination=0.49)
    assert str(caught.value) == (
        f"split: 1 of 2 examined documents of benchmark-0 (jsonl {tmp_path}/questions.jsonl) (50.00%) "
        "share 13 words in a row with train, or occur there as a whole, above split.max_contamination; "
        "remove them, or raise the limit: item 1"
    )
    assert json.loads((tmp_path / "split.json").read_text()) == report


def test_an_error_says_how_many_contaminated_items_it_does_not_list(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]]
) -> None:
    benchmark = write_benchmark(tmp_path, [" ".join([*RUN, f"q{i}"]) for i in range(23)])
    with pytest.raises(InputError, match=r": item 1, item 2, .*, item 20, and 3 more$"):
        report_on([on_side("train", RUN)], benchmarks=(benchmark,), max_contamination=0.0)
    report = json.loads((tmp_path / "split.json").read_text())
    assert report["ids"] == {"benchmark-0": [f"item {i}" for i in range(1, 24)]}
    assert report["unlisted"] == {"benchmark-0": 0}


def test_items_are_numbered_as_in_their_source(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items without text count, and pieces of a long item do not: the report once named other items."""
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
    run, other = " ".join(RUN), "other words " * 100_000  # in two pieces
    benchmark = write_benchmark(tmp_path, [None, run, "", other, None, other, run])
    report = report_on([on_side("train", RUN)], benchmarks=(benchmark,))
    assert report["ids"] == {"benchmark-0": ["item 2", "item 7"]}
    assert report["benchmark-0_documents"] == 6


def test_short_texts_are_compared_as_a_whole(tmp_path: Path, report_on: Callable[..., dict[str, Any]]) -> None:
    """From five words on; `the cat` and `yes` occur in any corpus. Scripts without spaces count by letters."""
    items = [
        "What is the capital of France?",
        "what is the",  # too short
        "yes",
        "is the capital of Spain",
        "what is the capital of France and Italy",
        "フランスの首都はどこですか",
        "日本の首都はどこですか",
    ]
    benchmark = write_benchmark(tmp_path, items)
    texts = [
        on_side("train", ["Q:", "what", "is", "the", "capital", "of", "FRANCE", "yes"]),
        "答え「フランスの首都はどこですか」",
    ]
    texts[1] = on_side("train", [texts[1]])
    report = report_on(texts, benchmarks=(benchmark,))
    assert (report["benchmark-0_documents"], report["benchmark-0_examined"]) == (7, 5)
    assert report["ids"] == {"benchmark-0": ["item 1", "item 6"]}
    assert report["share"] == {"benchmark-0": 2 / 5, "train": 1.0}


def test_a_share_of_nothing_is_null_and_fails_the_limit(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]]
) -> None:
    benchmark = write_benchmark(tmp_path, ["yes", "no", "a b c d"])
    texts = [on_side("train", RUN)]
    assert report_on(texts, benchmarks=(benchmark,))["share"] == {"benchmark-0": None, "train": 0.0}
    with pytest.raises(
        InputError, match=r"none of the 3 documents of benchmark-0 \(jsonl .*\) has 5 words or more"
    ):
        report_on(texts, benchmarks=(benchmark,), max_contamination=1.0)


@pytest.mark.parametrize(
    ("questions", "why"),
    [
        (
            [" ".join(RUN)] * 2,
            r".*questions\.jsonl: no line has the key `q`; the keys are question; set text_key",
        ),
        ([], "collect: no document left of 0: the sources are empty; add text, or check paths"),
    ],
)
def test_a_benchmark_without_text_is_an_error(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]], questions: list[str], why: str
) -> None:
    benchmark = write_benchmark(tmp_path, questions, key="question")
    with pytest.raises(InputError, match=rf"split\.benchmarks\.0: jsonl .*questions\.jsonl: {why}"):
        report_on([on_side("train", RUN)], benchmarks=(benchmark,))


def test_the_error_about_a_missing_benchmark_names_its_section(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]]
) -> None:
    missing = {"kind": "jsonl", "paths": (f"{tmp_path}/missing.jsonl",)}
    with pytest.raises(InputError, match=r"^split\.benchmarks\.0: .*no file matches; fix split\.benchmarks in"):
        report_on([on_side("train", RUN)], benchmarks=(missing,))


def test_a_benchmark_outside_of_data_sources_is_a_warning_of_stage_split(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report_on([on_side("train", RUN)], benchmarks=(write_benchmark(tmp_path, [" ".join(RUN)]),))
    printed = capsys.readouterr().err
    assert f"split: warning: {tmp_path}/questions.jsonl: outside data/sources" in printed
    assert "run `dvc repro -f split && dvc repro` after a change" in printed


def test_equal_items_of_a_benchmark_all_count(tmp_path: Path, report_on: Callable[..., dict[str, Any]]) -> None:
    benchmark = write_benchmark(tmp_path, [" ".join(RUN)] * 3)
    report = report_on([on_side("train", RUN)], benchmarks=(benchmark,))
    assert (report["benchmark-0_documents"], report["benchmark-0_contaminated"]) == (3, 3)


def test_benchmarks_are_cleaned_like_training_text_but_not_filtered(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]]
) -> None:
    """NFD, a byte order mark and a control character inside a word; a line that is short for the filters."""
    text = "Việc thừa nhận nhân phẩm vốn có và các quyền bình đẳng của mọi người"
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    benchmark = write_benchmark(tmp_path, ["\ufeff" + decomposed.replace("phẩm", "ph\1ẩm"), "x"])
    strict = {"min_document_bytes": 32, "filters": {"sentences": 2}}
    report = report_on([on_side("train", [f"{composed}.", "Hết."])], strict, benchmarks=(benchmark,))
    assert report["ids"] == {"benchmark-0": ["item 1"]}
    assert report["benchmark-0_documents"] == 2


# Thirteen to sixteen words in scripts with combining marks, without spaces, or both.
PASSAGES = {
    "Devanagari": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิต่างมีเหตุผลและมโนธรรม",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងសមភាពក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ មនុស្សមានវិចារណញ្ញាណ",
    "Burmese": "လူတိုင်းသည် ထိုသူတို့၌ ပိုင်းခြား ဝေဖန်တတ်သော ဉာဏ်နှင့် ကျင့်ဝတ် သိတတ်သော စိတ်တို့ရှိကြ၍ ထိုသူတို့သည် အချင်းချင်း မေတ္တာထား၍ ဆက်ဆံကျင့်သုံးသင့်၏",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌། ཐོབ་ཐངགི་རང་དབང་འདྲ་མཉམ་དུ་ཡོད་ལ། ཁོང་ཚོར་རང་བྱུང་གི",
    "Chinese": "人人生而自由。在尊严和权利上一律平等。他们赋有理性和良心",
    "Japanese": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である",
}


@pytest.mark.parametrize("script", PASSAGES)
def test_a_copied_passage_overlaps_in_each_script_and_its_parts_do_not(
    script: str, report_on: Callable[..., dict[str, Any]]
) -> None:
    """The copy is inside other text without spaces around it. A third of the passage has about five words."""
    passage = PASSAGES[script]
    third = len(passage) // 3
    start, middle, end = passage[:third], passage[third : 2 * third], passage[2 * third :]
    train, copy, shuffled = (
        on_side("train", ["We", "read:", passage, "and", "more"]),
        on_side("val", [f"{middle} {passage}{middle}"]),
        on_side("test", [middle, start, end, start]),
    )
    assert report_on([train, copy, shuffled])["share"] == {"test": 0.0, "train": 1.0, "val": 1.0}


def test_sanskrit_in_grantha_script_has_spaces() -> None:
    """Unicode breaks its lines like those of Javanese. A fifth of the UDHR once seemed to overlap."""
    words = split_words(["\U00011305\U00011338\U0001134d\U0001132f\U0001133e\U00011302 \U00011305\U0001132d"])
    assert words.lengths.tolist() == [WORD_LENGTH, WORD_LENGTH]


def test_a_sample_of_whole_documents_is_examined_if_there_is_much_text(
    tmp_path: Path, report_on: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling n-grams once missed documents that share a single run, so the shares fell with the sample."""
    runs = [[f"r{i}w{j}" for j in range(13)] for i in range(100)]
    held_out = [on_side("val", [f"a{i}w{j}" for j in range(20)] + runs[i // 2] * (i % 2)) for i in range(200)]
    texts = [*(on_side("train", [f"t{i}", *run]) for i, run in enumerate(runs)), *held_out]
    complete = report_on(texts)
    assert (complete["every_nth"], complete["val_examined"], complete["share"]["val"]) == (1, 200, 0.5)
    contaminated = {id_of(text.encode()) for text in held_out[1::2]}
    monkeypatch.setattr(overlap, "_MAX_RUNS", 900)
    report = report_on(texts)
    assert (report["every_nth"], report["val_documents"]) == (4, 200)
    assert 30 < report["val_examined"] < 70
    assert 0.35 < report["share"]["val"] < 0.65
    assert set(report["ids"]["val"]) <= contaminated
    with pytest.raises(InputError, match=r"of val \(\d\d\.\d\d%\) share 13 words in a row"):
        report_on(texts, max_contamination=0.35)


def test_without_held_out_documents_no_train_document_is_contaminated(
    report_on: Callable[..., dict[str, Any]],
) -> None:
    report = report_on([on_side("train", RUN)], val_fraction=0.2, test_fraction=0.0)
    assert report["share"] == {"train": 0.0}


def test_tasks_are_benchmarks_and_their_items_that_overlap_are_named(
    report_on: Callable[..., dict[str, Any]], tmp_path: Path, collect_params: Callable[..., CollectParams]
) -> None:
    train = [on_side("train", [f"t{i}", *RUN]) for i in range(4)]
    tasks = {
        "blimp": [" ".join(f"x{i}" for i in range(20)), "yes", "No: " + ", ".join(RUN).upper() + "?"],
        "piqa": ["none of these words are in the training text at all, not one of them"],
    }
    report = report_on(train, tasks=tasks)
    assert report["ids"]["task-blimp"] == ["item 3"]
    assert (report["task-blimp_documents"], report["task-blimp_examined"]) == (3, 2)
    assert report["share"]["task-blimp"] == 0.5
    assert report["share"]["task-piqa"] == 0
    assert report["benchmarks"] == {"task-blimp": "task blimp", "task-piqa": "task piqa"}
    split, params = split_params(**FIFTHS), collect_params({"kind": "jsonl", "paths": ("unused",)})
    lines = report_contamination(tmp_path / "raw", tmp_path / "split.json", split, params, SEED, tasks)
    assert lines == [
        "1 of 2 examined items of task blimp overlap with train: item 3",
        "1 of 3 items of task blimp are not examined: 1 have fewer than 5 words, 0 have no text",
    ]
    with pytest.raises(InputError, match="1 of 2 examined documents of task-blimp"):
        report_on(train, tasks=tasks, max_contamination=0.1)


def test_a_task_without_text_is_an_error(report_on: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"evaluate\.tasks: empty: no document has a text"):
        report_on([on_side("train", RUN)], tasks={"empty": [" "]})

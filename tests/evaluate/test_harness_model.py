"""lm-evaluation-harness on a tiny model, with tasks of the test: no data set is downloaded."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness_tasks import CHOICE, GENERATE, ROLLING, write_task

from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.harness.tasks import load_tasks
from gptpipe.model.gpt import GPT
from gptpipe.score.continuations import load_generator
from gptpipe.score.scoring import Scoring

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[harness]'")
from gptpipe.evaluate.harness_model import HarnessModel, run_tasks


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Tokenizer]:
    return load_generator(tiny.make_model(tmp_path_factory.mktemp("model") / "gpt"))


@torch.no_grad()
def nats_of(model: GPT, context: list[int], target: list[int]) -> float:
    text = [*context, *target][-17:]  # of a context of 16 tokens
    logits = model(torch.tensor([text[:-1]]))[0].log_softmax(-1)
    return -sum(logits[i - 1, text[i]].item() for i in range(len(text) - len(target), len(text)))


def run(folder: Path, generator: tuple[GPT, Tokenizer], *names: str) -> dict[str, dict[str, Any]]:
    lm = HarnessModel(*generator, Scoring(), seed=3)
    return run_tasks(lm, load_tasks(names, folder), seed=3)


def test_the_likelier_choice_is_the_answer(tmp_path: Path, generator: tuple[GPT, Tokenizer]) -> None:
    model, tokenizer = generator
    documents = [
        {"question": f"the {word}", "choices": ["cat", "dog on the log"], "answer": i % 2}
        for i, word in enumerate(["mat", "log", "cat", "dog", "sat"])
    ]
    write_task(tmp_path, CHOICE, documents)
    result = run(tmp_path, generator, "choice")["choice"]
    n_right = 0
    for document in documents:
        context = tokenizer.encode(document["question"])
        nats = [nats_of(model, context, tokenizer.encode(f" {choice}")) for choice in document["choices"]]
        n_right += nats.index(min(nats)) == document["answer"]
    share = n_right / 5
    assert result["metrics"]["acc"] == pytest.approx(share)
    assert result["metrics"]["acc_standard_error"] == pytest.approx((share * (1 - share) / 4) ** 0.5)
    assert (result["n_documents"], result["n_examples"]) == (5, 0)
    assert len(result["digest"]) == 64


def test_a_text_is_scored_in_windows_and_bits_per_byte_follow(
    tmp_path: Path, generator: tuple[GPT, Tokenizer]
) -> None:
    model, tokenizer = generator
    text = "the cat sat on the mat, the dog sat on the log, and a naïve cat"
    write_task(tmp_path, ROLLING, [{"text": text}])
    ids = tokenizer.encode(text)
    assert len(ids) > 32
    before = [tokenizer.end_of_text]
    nats = 0.0
    for start in range(0, len(ids), 16):  # the last window has as much context as fits
        nats += nats_of(model, before, ids[start : start + 16])
        before += ids[start : start + 16]
    result = run(tmp_path, generator, "rolling")["rolling"]
    expected = nats / len(text.encode()) / math.log(2)
    assert result["metrics"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_an_answer_is_generated_greedily_up_to_a_stop_string(
    tmp_path: Path, generator: tuple[GPT, Tokenizer]
) -> None:
    model, tokenizer = generator
    prompts, answers = ["the cat sat", "on the log"], []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        answers.append(tokenizer.decode(ids[len(tokenizer.encode(prompt)) :]))
    stop = answers[0][2:4]
    documents = [
        {"prompt": prompts[0], "answer": answers[0].split(stop)[0]},
        {"prompt": prompts[1], "answer": "no"},
    ]
    task = GENERATE | {"generation_kwargs": {"until": [stop], "max_gen_toks": 4}}
    write_task(tmp_path, task, documents)
    result = run(tmp_path, generator, "generate")["generate"]
    assert result["metrics"]["exact_match"] == 0.5


def test_the_digest_changes_with_documents_prompts_and_answers(
    tmp_path: Path, generator: tuple[GPT, Tokenizer]
) -> None:
    documents = [{"question": "the cat", "choices": ["cat", "dog"], "answer": 0, "note": 1}]
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({}, {"note": 2}),
        ({}, {"answer": 1}),
        ({"doc_to_text": "Q: {{question}}"}, {}),
    ]
    digests = []
    for i, (of_task, of_document) in enumerate(changes):
        folder = tmp_path / str(i)
        write_task(folder, CHOICE | of_task, [document | of_document for document in documents])
        digests.append(run(folder, generator, "choice")["choice"]["digest"])
    write_task(tmp_path / "again", CHOICE, documents)
    assert run(tmp_path / "again", generator, "choice")["choice"]["digest"] == digests[0]
    assert len(set(digests)) == 4

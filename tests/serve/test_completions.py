"""`/v1/completions` with the real client of OpenAI, and what plain HTTP sees."""

import json
import math
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from served import Served, serve, wait_until

from gptpipe.model.generate import Sampling
from gptpipe.score.continuations import load_generator
from gptpipe.score.text_batch import continue_text
from gptpipe.serve.limits import Limits

# Always the most probable token: the models of these tests then never end a document.
ENDLESS: dict[str, Any] = {"max_tokens": 10**6, "temperature": 0}
KEY = "a key of sixteen".replace(" ", "-")


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def alone(folder: Path, prompt: str, n: int, stop: tuple[str, ...] = (), **options: Any) -> str:
    """The text that `gptpipe generate` prints for the prompt."""
    return "".join(continue_text(*load_generator(folder), prompt, n, Sampling(**options), stop))


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and document of a request without OpenAI's client."""
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_completion_is_the_text_of_generate(client: openai.OpenAI, folders: list[Path]) -> None:
    answer = client.completions.create(
        model="gpt", prompt="the cat", max_tokens=12, temperature=0.9, top_p=0.95, seed=5
    )
    (choice,) = answer.choices
    assert choice.text == alone(folders[0], "the cat", 12, temperature=0.9, top_p=0.95, seed=5)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    assert (answer.object, answer.model) == ("text_completion", "gpt")
    assert answer.usage is not None
    n_prompt = len(load_generator(folders[0])[1].encode("the cat"))
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (n_prompt, 12, n_prompt + 12)


def test_other_options_are_those_of_generate(client: openai.OpenAI, folders: list[Path]) -> None:
    options = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3}
    answer = client.completions.create(model="other", prompt="a", max_tokens=9, seed=1, extra_body=options)
    assert answer.choices[0].text == alone(folders[1], "a", 9, seed=1, **options)


def test_a_stream_has_the_same_text_in_pieces(client: openai.OpenAI, folders: list[Path]) -> None:
    stream = client.completions.create(
        model="gpt",
        prompt="the cat",
        max_tokens=20,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone(folders[0], "the cat", 20, seed=3)
    assert len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 20
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_each_prompt_has_n_choices_with_seeds_that_follow(client: openai.OpenAI, folders: list[Path]) -> None:
    prompts = ["the", "a dog on the mat"]
    answer = client.completions.create(model="gpt", prompt=prompts, n=2, max_tokens=8, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = [alone(folders[0], prompt, 8, seed=seed) for prompt in prompts for seed in (7, 8)]
    assert [choice.text for choice in answer.choices] == expected
    streamed = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(model="gpt", prompt=prompts, n=2, max_tokens=8, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == expected


def test_prompts_may_be_token_ids(client: openai.OpenAI, folders: list[Path]) -> None:
    ids = load_generator(folders[0])[1].encode("the cat")
    expected = alone(folders[0], "the cat", 6, seed=1)
    for prompt in (ids, [ids]):
        answer = client.completions.create(model="gpt", prompt=prompt, max_tokens=6, seed=1)
        assert answer.choices[0].text == expected


def test_without_a_seed_texts_differ(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="gpt", prompt="the", max_tokens=16, n=3)
    assert len({choice.text for choice in answer.choices}) == 3


def test_a_text_ends_before_a_stop_string(client: openai.OpenAI, folders: list[Path]) -> None:
    whole = alone(folders[0], "the", 16, seed=2)
    stop = whole[4:6]
    answer = client.completions.create(model="gpt", prompt="the", max_tokens=16, seed=2, stop=["zzzz", stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_network(client: openai.OpenAI, folders: list[Path]) -> None:
    """With `echo` also of the prompt, whose first token has none."""
    model, tokenizer = load_generator(folders[0])
    answer = client.completions.create(
        model="gpt", prompt="the cat", max_tokens=5, seed=3, temperature=0.5, logprobs=3, echo=True
    )
    choice = answer.choices[0]
    assert choice.text == "the cat" + alone(folders[0], "the cat", 5, temperature=0.5, seed=3)
    logprobs = choice.logprobs
    assert logprobs is not None
    prompt = tokenizer.encode("the cat")
    assert logprobs.tokens[: len(prompt)] == [tokenizer.decode([i]) for i in prompt]
    assert len(logprobs.tokens) == len(prompt) + 5
    ids = [token_id(tokenizer, name) for name in logprobs.tokens]
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids[:-1]]))[0].log_softmax(dim=-1)
    assert logprobs.token_logprobs[0] is None
    for place, value in enumerate(logprobs.token_logprobs[1:]):
        assert value == pytest.approx(expected[place, ids[place + 1]].item(), abs=1e-4)
        top = logprobs.top_logprobs[place + 1]
        assert top is not None
        assert sorted(top.values()) == pytest.approx(expected[place].topk(3).values.flip(0).tolist(), abs=1e-4)
    for name, start, end in zip(logprobs.tokens, logprobs.text_offset, logprobs.text_offset[1:], strict=False):
        shown = choice.text[start:end].removeprefix("\N{REPLACEMENT CHARACTER}")  # of an incomplete one before
        assert name.startswith("bytes:") or shown == name


def token_id(tokenizer: Any, name: str) -> int:
    """The id of a token that the server names."""
    if name in tokenizer.special_tokens:
        return int(tokenizer.special_tokens[name])
    escapes = name.removeprefix("bytes:")
    content = bytes.fromhex(escapes.replace("\\x", "")) if name.startswith("bytes:") else name.encode()
    return int(tokenizer.ranks[content])


def test_a_prompt_can_be_scored_alone(client: openai.OpenAI) -> None:
    for n in (0, 1):
        answer = client.completions.create(
            model="gpt", prompt="the cat", max_tokens=n, logprobs=0, echo=True, temperature=0
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert answer.usage is not None
        assert answer.usage.completion_tokens == n
        assert len(logprobs.tokens) == answer.usage.prompt_tokens + n
        assert math.fsum(value for value in logprobs.token_logprobs[1:] if value) < 0


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["gpt", "other"]
    assert client.models.retrieve("other").owned_by == "gptpipe"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'; there are gpt, other"):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("max_tokens", -1, "greater than or equal to 0"),
        ("max_tokens", 5000, "this server allows 4096"),
        ("max_tokens", "many", "valid integer"),
        ("temperature", -1, "must be 0 or more"),
        ("top_p", 0, "must be above 0"),
        ("top_k", 0, "must be 1 or more"),
        ("min_p", 2, "must be from 0 to 1"),
        ("repetition_penalty", 0, "must be above 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 65, "less than or equal to 64"),
        ("best_of", 2, "equal to n"),
        ("logprobs", 21, "less than or equal to 20"),
        ("stop", [""], "1 to 1000 characters"),
        ("stop", ["x"] * 17, "at most 16"),
        ("prompt", {}, "must be a text, a list"),
        ("prompt", [], "must be 1 to 64, not 0"),
        ("prompt", ["x"] * 65, "must be 1 to 64, not 65"),
        ("prompt", "x" * 17, "the context of the model has 16"),
        ("prompt", [270], "must be 0 to 269"),
        ("prompt", [[]], "must be 0 to 269"),
        ("prompt", "x" + " " * 100_001, "100,000 whitespace"),
        ("suffix", "end", "not supported"),
        ("presence_penalty", 0.5, "not supported"),
        ("logit_bias", {"5": 1}, "not supported"),
        ("stream_options", {"x": 1}, "Extra inputs"),
        ("messages", [], "Extra inputs"),
    ],
)
def test_a_wrong_field_is_named(served: Served, field: str, value: Any, reason: str) -> None:
    body = json.dumps({"model": "gpt", "prompt": "x", field: value}).encode()
    status, document = post(served.url, body)
    assert (status, document["error"]["param"]) == (400, field)
    assert reason in document["error"]["message"]
    assert document["error"]["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_accepted(client: openai.OpenAI) -> None:
    client.completions.create(
        model="gpt",
        prompt="x",
        max_tokens=1,
        best_of=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        suffix=None,
        user="me",
        temperature=None,
        stream=False,
    )


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b'{"model": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(served: Served, body: bytes) -> None:
    status, document = post(served.url, body)
    assert status == 400
    assert document["error"]["message"]


def test_unknown_models_and_paths_are_not_found(served: Served) -> None:
    status, document = post(served.url, b'{"model": "gpt-4", "prompt": "x"}')
    assert (status, document["error"]["param"], document["error"]["code"]) == (404, "model", "model_not_found")
    with pytest.raises(urllib.error.HTTPError, match="404") as missing:
        urllib.request.urlopen(f"{served.url}/v1/nothing", timeout=20)
    with missing.value as answer:
        assert json.loads(answer.read())["error"]["message"] == "Not Found"


def test_requests_from_other_web_sites_are_refused(served: Served) -> None:
    """A site can send plain text to any server, and can give its own name to this machine."""
    body = b'{"model": "gpt", "prompt": "x"}'
    assert post(served.url, body, **{"Content-Type": "text/plain"})[0] == 415
    status, document = post(served.url, body, Host="evil.example:80")
    assert (status, document["error"]["code"]) == (403, "wrong_host")
    assert post(served.url, body, Host="LOCALHOST")[0] == 200


def test_requests_of_too_many_bytes_are_refused(served: Served) -> None:
    body = json.dumps({"model": "gpt", "prompt": "x" * (1 << 20)}).encode()
    status, document = post(served.url, body)
    assert status == 413
    assert "1,048,576 bytes" in document["error"]["message"]


def test_with_a_key_every_request_needs_it(folders: list[Path]) -> None:
    with serve(folders[:1], key=KEY) as running:
        good = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
        bad = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY + "x", max_retries=0)
        with good, bad:
            assert good.completions.create(model="gpt", prompt="x", max_tokens=1).choices
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                bad.completions.create(model="gpt", prompt="x", max_tokens=1)
            with pytest.raises(openai.AuthenticationError):
                bad.models.list()
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(f"{running.url}/metrics", timeout=20)
        refused.value.close()
        for path in ("/health", "/"):
            with urllib.request.urlopen(f"{running.url}{path}", timeout=20) as answer:
                assert answer.status == 200


def test_many_clients_get_the_texts_that_they_get_alone(served: Served, folders: list[Path]) -> None:
    """More at once than are continued together."""
    prompts = [f"the {'cat sat on '[: i % 11]}" for i in range(40)]

    def ask(number: int) -> str:
        body = {"model": "gpt", "prompt": prompts[number], "max_tokens": 6 + number % 9, "seed": number}
        status, document = post(served.url, json.dumps(body).encode())
        assert status == 200
        return str(document["choices"][0]["text"])

    with ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(ask, range(40)))
    expected = [alone(folders[0], prompts[i], 6 + i % 9, seed=i) for i in range(40)]
    assert texts == expected


def test_a_full_queue_refuses_more(folders: list[Path]) -> None:
    with serve(folders[:1], Limits(sequences=1, queue=2, grace_seconds=0.1, max_tokens=10**6)) as running:
        (worker,) = running.workers
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        with (
            client,
            client.completions.create(model="gpt", prompt="x", **ENDLESS, stream=True) as stream,
        ):
            next(iter(stream))
            with client.completions.create(model="gpt", prompt="x", max_tokens=9, n=2, stream=True):
                wait_until(lambda: worker.n_waiting == 2)
                with pytest.raises(openai.RateLimitError, match="too many requests are waiting"):
                    client.completions.create(model="gpt", prompt="x", max_tokens=9)


def test_a_client_that_goes_away_frees_its_place(folders: list[Path]) -> None:
    with serve(folders[:1], Limits(grace_seconds=0.1, max_tokens=10**6)) as running:
        (worker,) = running.workers
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        with client:
            stream = client.completions.create(model="gpt", prompt="x", **ENDLESS, n=2, stream=True)
            next(iter(stream))
            assert worker.n_running == 2
            stream.close()
            wait_until(lambda: worker.n_running == 0)
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(model="gpt", prompt="x", **ENDLESS, timeout=0.3)
            wait_until(lambda: worker.n_running == 0)


def test_a_request_that_takes_too_long_ends_with_an_error(folders: list[Path]) -> None:
    with serve(folders[:1], Limits(seconds=0.2, grace_seconds=0.1, max_tokens=10**6)) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        with client:
            with pytest.raises(openai.InternalServerError, match=r"more than 0\.2 seconds"):
                client.completions.create(model="gpt", prompt="x", **ENDLESS)
            stream = client.completions.create(model="gpt", prompt="x", **ENDLESS, stream=True)
            with pytest.raises(openai.APIError, match=r"more than 0\.2 seconds"):
                list(stream)


def test_running_requests_end_soon_when_the_server_ends(folders: list[Path]) -> None:
    """With an error that says so; and so do those that wait."""
    errors: list[str] = []

    def read(url: str) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.APIError) as caught:
            list(client.completions.create(model="gpt", prompt="x", **ENDLESS, stream=True))
        errors.append(caught.value.message)

    limits = Limits(sequences=1, grace_seconds=0.3, max_tokens=10**6)
    with serve(folders[:1], limits) as running:
        (worker,) = running.workers
        threads = [threading.Thread(target=read, args=[running.url]) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: worker.n_running == 1 and worker.n_waiting == 1)
    for thread in threads:
        thread.join(20)
    assert errors == ["the server is shutting down; repeat the request later"] * 2
    assert not worker.is_healthy


def test_a_model_that_fails_answers_with_an_error(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(folders[:1]) as running:
        (worker,) = running.workers

        def fail(*_: object) -> None:
            raise RuntimeError("no such kernel\nmore")

        hook = worker._model.embedding.register_forward_hook(fail)
        status, document = post(running.url, b'{"model": "gpt", "prompt": "x"}')
        assert (status, document["error"]["type"]) == (500, "server_error")
        assert document["error"]["message"] == "the model failed: no such kernel"
        hook.remove()
        assert post(running.url, b'{"model": "gpt", "prompt": "x"}')[0] == 200
    assert "error: gpt: RuntimeError: no such kernel" in capsys.readouterr().err


def test_health_and_metrics_count_what_happens(folders: list[Path]) -> None:
    with serve(folders[:1]) as running:
        with urllib.request.urlopen(f"{running.url}/health", timeout=20) as answer:
            assert json.loads(answer.read()) == {"status": "ok"}
        post(running.url, b'{"model": "gpt", "prompt": "x", "max_tokens": 5}')
        post(
            running.url, b'{"model": "gpt", "prompt": "x", "max_tokens": 5, "stream": true, "temperature": -1}'
        )
        with urllib.request.urlopen(f"{running.url}/metrics", timeout=20) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            lines = answer.read().decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values['gptpipe_requests_total{status="200"}'] == "1"
        assert values['gptpipe_requests_total{status="400"}'] == "1"
        assert values['gptpipe_prompt_tokens_total{model="gpt"}'] == "1"
        assert values['gptpipe_generated_tokens_total{model="gpt"}'] == "5"
        assert values['gptpipe_sequences_running{model="gpt"}'] == "0"
        assert values['gptpipe_sequences_waiting{model="gpt"}'] == "0"
        assert values["gptpipe_request_seconds_count"] == "2"
        assert values['gptpipe_request_seconds_bucket{le="+Inf"}'] == "2"
        assert values["gptpipe_first_token_seconds_count"] == "1"

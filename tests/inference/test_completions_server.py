"""The server speaks OpenAI's completions protocol to OpenAI's own client, and stays up whatever clients do."""

from __future__ import annotations

import json
import math
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import openai
import psutil
import pytest
import torch
from model_cases import ROUTERS, lively_model, small_model_config
from text_helpers import train

from megachiar import local_server
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.inference.completion_request import CompletionLimits
from megachiar.inference.completions_server import CompletionsServer, ServedModel
from megachiar.inference.engine import Engine
from megachiar.inference.generation import generate
from megachiar.inference.service import Service

VOCABULARY, LONGEST = 400, 64
PROMPT = "the quick brown fox"


class Served:
    """A server in this process, with its model and tokenizer, and a client of OpenAI's."""

    def __init__(self, folder, most_running: int = 4, most_texts: int = 400, **model):
        config = small_model_config(vocab_size=VOCABULARY, max_sequence_length=LONGEST, **model)
        self.model = lively_model(config, dtype=torch.float32).eval()
        self.tokenizer = load_tokenizer(train(folder, "sentencepiece", VOCABULARY))
        self.end = self.tokenizer.eod_id
        self.known = torch.zeros(VOCABULARY, dtype=torch.bool)
        # An untrained model would mostly draw single bytes, which make no text.
        whole = [token for token in self.tokenizer.known_ids() if "\ufffd" not in self.tokenizer.decode([5, token])]
        self.known[whole] = True
        self.service = Service(Engine(self.model, self.known, most_running), most_texts)
        card = ServedModel("small", 1, self.tokenizer, self.end)
        limits = CompletionLimits(LONGEST, most_new_tokens=200, most_choices=8)
        self.server = CompletionsServer(card, self.service, "127.0.0.1", 0, limits)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.client = openai.OpenAI(base_url=f"{self.server.url}v1", api_key="none", max_retries=0, timeout=120)

    def ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text)]

    def expected(self, prompt: str, count: int, **sampling) -> str:
        """Return what follows ``prompt`` by generation of one text."""
        ids = self.ids(prompt)
        new = generate(self.model, ids, count, eod_id=self.end, known_ids=self.known, **sampling)
        return self.tokenizer.decode([*ids, *new])[len(self.tokenizer.decode(ids)) :]

    def complete(self, **fields):
        return self.client.completions.create(**({"model": "small", "prompt": PROMPT} | fields))

    def wait_until_idle(self) -> None:
        for _ in range(200):
            if self.service.texts == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.service.texts} texts are left")

    def close(self) -> None:
        self.server.shutdown()
        self.server.stop()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.close()


def test_the_model_is_listed(served):
    assert [model.id for model in served.client.models.list()] == ["small"]
    assert served.client.models.retrieve("small").owned_by == "megachiar"


def test_an_answer_is_what_generation_of_one_text_gives(served):
    answer = served.complete(max_tokens=20, temperature=0)
    (choice,) = answer.choices
    assert choice.text == served.expected(PROMPT, 20, temperature=0)
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage.prompt_tokens == len(served.ids(PROMPT)) and answer.usage.completion_tokens == 20
    drawn = served.complete(max_tokens=12, temperature=0.9, top_p=0.8, seed=7, extra_body={"top_k": 50})
    assert drawn.choices[0].text == served.expected(PROMPT, 12, temperature=0.9, top_p=0.8, top_k=50, seed=7)


def test_a_stream_is_the_same_text_in_pieces(served):
    pieces = list(served.complete(max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}))
    texts = [choice.text for piece in pieces for choice in piece.choices]
    assert "".join(texts) == served.expected(PROMPT, 20, temperature=0) and len(texts) > 5
    assert [choice.finish_reason for piece in pieces for choice in piece.choices if choice.finish_reason] == ["length"]
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == 20


def test_prompts_and_choices_come_in_their_order(served):
    prompts = [PROMPT, "Document 7", served.ids("old ships sail")]
    answer = served.complete(prompt=prompts[:2], n=2, max_tokens=8, temperature=1, seed=3)
    expected = [served.expected(prompt, 8, temperature=1.0, seed=3 + i) for prompt in prompts[:2] for i in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    by_ids = served.complete(prompt=prompts[2], max_tokens=8, temperature=0).choices[0].text
    assert by_ids == served.expected("old ships sail", 8, temperature=0)


@pytest.mark.parametrize("streams", (False, True))
def test_a_stop_string_ends_the_text_wherever_tokens_end(served, streams):
    whole = served.expected(PROMPT, 40, temperature=0)
    for start, length in ((5, 1), (11, 4), (17, 9)):
        stop = whole[start : start + length]
        answer = served.complete(max_tokens=40, temperature=0, stop=[stop, "never to be seen"], stream=streams)
        choices = [piece.choices[0] for piece in answer] if streams else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"
    served.wait_until_idle()


def test_logprobs_are_those_of_a_full_pass(served):
    answer = served.complete(max_tokens=10, temperature=0, logprobs=3, echo=True)
    (choice,) = answer.choices
    ids = served.ids(PROMPT)
    new = generate(served.model, ids, 10, temperature=0, eod_id=served.end, known_ids=served.known)
    text = [*ids, *new]
    with torch.no_grad():
        probabilities = served.model(torch.tensor([text])).logits[0].double().softmax(-1)
    known = probabilities.masked_fill(~served.known, 0)
    scores, logprobs = choice.logprobs.token_logprobs, choice.logprobs
    assert scores[0] is None and logprobs.top_logprobs[0] is None and len(scores) == len(text)
    for place in range(1, len(text)):
        probability = probabilities[place - 1, text[place]].item()
        assert math.exp(scores[place]) == pytest.approx(probability, rel=1e-4)
        top = logprobs.top_logprobs[place]
        assert 1 <= len(top) <= 3
        assert math.exp(max(top.values())) == pytest.approx(known[place - 1].max().item(), rel=1e-4)
    assert "".join(logprobs.tokens) == choice.text
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    streamed = list(served.complete(max_tokens=10, temperature=0, logprobs=3, echo=True, stream=True))
    assert "".join(piece.choices[0].text for piece in streamed) == choice.text
    assert [score for piece in streamed for score in piece.choices[0].logprobs.token_logprobs] == pytest.approx(scores)


def test_a_prompt_is_scored_without_new_tokens(served):
    (choice,) = served.complete(max_tokens=0, logprobs=0, echo=True).choices
    assert len(choice.logprobs.token_logprobs) == len(served.ids(PROMPT)) and choice.finish_reason == "length"
    assert served.complete(max_tokens=0).choices[0].text == ""


BAD = {
    "max_tokens": [-1, 201, 1.5, "many", True, 10**400],
    "temperature": [-0.1, "hot"],
    "top_p": [0, 1.1],
    "n": [0, 9],
    "seed": [-1, 0.5],
    "stop": ["", ["a"] * 5, [3], "x" * 201],
    "stream": ["yes"],
    "logprobs": [21, -1],
    "echo": [1],
    "prompt": [5, [], [[]] * 20, ["a", 1], [VOCABULARY + 7], "word " * 200],
    "stream_options": [{"include_usage": True}, 3],
    "best_of": [2],
    "frequency_penalty": [0.5],
    "logit_bias": [{"5": 1}],
    "suffix": ["end"],
    "max_token": [5],
    "model": [7],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_field_is_named(served, field, value):
    with pytest.raises(openai.BadRequestError) as refused:
        served.complete(prompt=PROMPT, max_tokens=2, extra_body={field: value})
    error = refused.value.response.json()["error"]
    assert error["param"] == field and error["type"] == "invalid_request_error" and field in error["message"]
    assert len(error["message"]) < 500


def test_another_model_and_another_path_are_not_found(served):
    with pytest.raises(openai.NotFoundError, match="small"):
        served.complete(model="gpt-5")
    with pytest.raises(openai.NotFoundError):
        served.client.chat.completions.create(model="small", messages=[{"role": "user", "content": "hello"}])


def raw(served, body: bytes, headers: dict[str, str] | None = None, path: str = "/v1/completions") -> tuple[int, dict]:
    connection = HTTPConnection("127.0.0.1", served.server.server_port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json"} | (headers or {}))
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Host": "evil.example"}, 421),
        (b"{}", {"Origin": "http://evil.example"}, 403),
        (b"{}", {}, 400),
    ],
)
def test_what_is_no_request_is_refused(served, body, headers, status):
    got, content = raw(served, body, headers)
    assert got == status and content["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "NaN"), ("temperature", "9" * 400), ("prompt", '"\\ud800"'), ("top_p", "-Infinity")],
)
def test_a_bad_field_that_no_client_sends_is_named(served, field, value):
    status, content = raw(served, f'{{"model": "small", "{field}": {value}}}'.encode())
    assert status == 400 and content["error"]["param"] == field


@pytest.mark.parametrize(
    "start", (b"POST /v1/compl", b"POST / HTTP/1.1\r\nContent-Length: 999\r\nHost: localhost\r\n\r\n{")
)
def test_a_client_that_sends_a_byte_now_and_then_loses_its_place(start, served, monkeypatch):
    """Each byte comes in time, and the request never does."""
    monkeypatch.setattr(local_server, "SECONDS_TO_SEND", 1)
    with socket.create_connection(("127.0.0.1", served.server.server_port), timeout=0.1) as connection:
        connection.sendall(start)
        for _ in range(600):
            try:
                connection.sendall(b"x")
                if connection.recv(65536) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the connection is open for a minute")


def test_health_says_how_much_there_is_to_do(served):
    connection = HTTPConnection("127.0.0.1", served.server.server_port)
    connection.request("GET", "/health")
    state = json.loads(connection.getresponse().read())
    assert state["status"] == "ok" and state["texts"] == 0


def test_a_client_that_goes_frees_its_places(served):
    served.wait_until_idle()
    for streams in (False, True):
        body = {"model": "small", "prompt": PROMPT, "max_tokens": 200, "n": 8, "stream": streams}
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", served.server.server_port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            for _ in range(100):
                if served.service.texts:
                    break
                time.sleep(0.02)
            assert served.service.texts
        served.wait_until_idle()


def test_one_too_many_is_told_so(tmp_path):
    served = Served(tmp_path, most_running=1, most_texts=2)
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: _status(lambda: served.complete(max_tokens=60)), range(8)))
        assert set(answers) == {200, 429}
    finally:
        served.close()
    assert served.service.texts == 0


def test_the_end_of_the_server_ends_its_answers(tmp_path):
    served = Served(tmp_path)
    pieces = served.complete(max_tokens=200, n=8, stream=True)
    next(iter(pieces))
    served.close()
    with pytest.raises(openai.APIError, match="server ends"):
        list(pieces)


def _status(call) -> int:
    try:
        call()
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def test_two_hundred_clients_at_a_time(served):
    """Good, streamed, malformed, too long and cancelled requests together: each answer is right or a clear error."""
    draw = random.Random(0)
    prompts = [PROMPT, "Document 7: the", "lazy dogs", "home & rest"]
    expected = {(p, c): served.expected(p, c, temperature=0) for p in prompts for c in (5, 17)}

    def one(number: int) -> str:
        prompt, count = prompts[number % 4], (5, 17)[number // 4 % 2]
        kind = ("plain", "stream", "malformed", "too long", "cancelled")[number % 5]
        fields = {"prompt": prompt, "max_tokens": count, "temperature": 0}
        if kind == "plain":
            assert served.complete(**fields).choices[0].text == expected[prompt, count]
        elif kind == "stream":
            pieces = served.complete(**fields, stream=True)
            assert "".join(piece.choices[0].text for piece in pieces) == expected[prompt, count]
        elif kind == "malformed":
            assert _status(lambda: served.complete(**fields, extra_body={"top_p": 7})) == 400
        elif kind == "too long":
            assert _status(lambda: served.complete(prompt="long " * 300)) == 400
        else:
            pieces = served.complete(prompt=prompt, max_tokens=200, stream=True)
            next(iter(pieces))
            pieces.close()
        return kind

    served.complete(max_tokens=5)
    before = psutil.Process().memory_info().rss
    numbers = list(range(200))
    draw.shuffle(numbers)
    with ThreadPoolExecutor(200) as pool:
        kinds = list(pool.map(one, numbers))
    assert len(kinds) == 200 and len(set(kinds)) == 5
    served.wait_until_idle()
    assert served.service.cache_bytes == 0
    assert psutil.Process().memory_info().rss - before < 300 * 2**20
    assert served.complete(max_tokens=5, temperature=0).choices[0].text == expected[PROMPT, 5], "it still serves"


@pytest.mark.parametrize(
    "model", ({"meta_router": {"pool": "batch"}}, {"router": ROUTERS["random"], "attention": {"keys": "routed"}})
)
def test_any_model_is_served(tmp_path, model):
    served = Served(tmp_path, **model)
    try:
        assert served.complete(max_tokens=6, temperature=0).choices[0].text == served.expected(PROMPT, 6, temperature=0)
    finally:
        served.close()

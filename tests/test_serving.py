"""A model over HTTP: what is asked for comes, as it would without a server, whatever else is asked for meanwhile."""

import contextlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import uvicorn
from over_bytes import text_model

import caddf
from caddf import generate, score
from caddf.cli import main
from caddf.errors import InputError
from caddf.serving.app import application
from caddf.serving.requests import Completion, read
from caddf.serving.worker import Worker


@pytest.fixture(scope="module")
def model():
    return text_model(scale=3.0)


@contextlib.contextmanager
def served(model, **settings):
    """The address of a server."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(application(model, "small", **settings), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(model):
    with served(model) as address:
        yield address


def opened(address, path, body=None):
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def ask(address, path="/v1/completions", /, **body):
    with opened(address, path, body or None) as reply:
        return json.load(reply)


def stream(address, path="/v1/completions", /, **body):
    """The events; the last of them says that it is the last."""
    with opened(address, path, body) as reply:
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        *events, last = reply.read().decode().split("\n\n")[:-1]
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(address, path="/v1/completions", /, **body):
    with pytest.raises(urllib.error.HTTPError) as error:
        opened(address, path, body)
    said = json.load(error.value)["error"]
    return error.value.code, said["message"]


def last(*arguments, **settings):
    *_, frame = generate(*arguments, **settings)
    return frame


def test_it_says_what_it_is(address):
    assert ask(address, "/health")["status"] == "ok"
    assert [each["id"] for each in ask(address, "/v1/models")["data"]] == ["small"]
    with opened(address, "/") as page:
        text = page.read().decode()
    assert "<title>small</title>" in text and "<option>speculative</option>" in text and "[MASK:24]" in text
    assert "http" not in text.replace("http-equiv", "")  # nothing is fetched from elsewhere


@pytest.mark.parametrize("decoder", [None, "autoregressive", "confidence"])
def test_a_completion_is_what_generate_writes(model, address, decoder):
    given = dict(temperature=0.7, top_p=0.9, seed=5, decoder=decoder)
    reply = ask(address, prompt=["def f", "x"], max_tokens=11, n=2, model="small", **given)
    alone = last(model, ["def f", "def f", "x", "x"], max_new_tokens=11, **given)
    assert [choice["text"] for choice in reply["choices"]] == alone.texts
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3] and reply["object"] == "text_completion"
    for choice, result in zip(reply["choices"], alone.results(), strict=True):
        assert choice["finish_reason"] == result["ended_by"]
        assert choice["statistics"]["rounds"] == result["rounds"]
        assert choice["statistics"]["evaluations"] == result["evaluations"]
    written = sum(result["tokens"] for result in alone.results())
    assert reply["usage"] == {"prompt_tokens": 6, "completion_tokens": written, "total_tokens": 6 + written}


def test_a_stream_takes_nothing_back_and_comes_to_the_same(address):
    asked = dict(prompt=["ab", "c"], max_tokens=16, seed=1, stop=["e", "zz"])
    whole = ask(address, **asked)
    *chunks, usage = stream(address, **asked, stream=True, stream_options={"include_usage": True})
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert reasons[choice["index"]] is None
            texts[choice["index"]] += choice["text"]
    assert len(chunks) > 1 and texts == [choice["text"] for choice in whole["choices"]]
    finished = {choice["index"]: choice["finish_reason"] for choice in chunks[-1]["choices"]}
    assert finished == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert {chunk["seed"] for chunk in [*chunks, usage]} == {1}


@pytest.mark.parametrize("decoder", ["remasking", "ancestral", "hybrid", "block"])
def test_a_text_is_the_last_frames_whatever_stood_before(model, address, decoder):
    settings = {"steps": 16, "eta": 0.5} if decoder == "remasking" else {}
    for seed in range(4):
        asked = dict(temperature=0.5, seed=seed, stop=["a", "e", " "], decoder=decoder)
        reply = ask(address, prompt="ab", max_tokens=20, settings=settings, **asked)
        frame = last(model, "ab", max_new_tokens=20, **asked, **settings)
        assert reply["choices"][0]["text"] == frame.text
        assert reply["choices"][0]["finish_reason"] == frame.results()[0]["ended_by"] is not None


def test_what_ends_a_text_is_told(model, address):
    free = last(model, "ab", max_new_tokens=16, seed=3).text
    word = free[4:6]
    reply = ask(address, prompt="ab", max_tokens=16, seed=3, stop=word)
    assert reply["choices"][0]["text"] == free[: free.index(word)]
    assert reply["choices"][0]["finish_reason"] == "stop"
    at_its_end = ask(address, prompt="ab", max_tokens=free.index(word) + 2, seed=3, stop=word)["choices"][0]
    assert at_its_end["text"] == free[: free.index(word)] and at_its_end["finish_reason"] == "stop"
    assert ask(address, prompt="ab", max_tokens=4, seed=3)["choices"][0]["finish_reason"] == "length"


def test_a_hole_is_filled_between_prompt_and_suffix(model, address):
    filled = last(model, template="if x:[MASK:5]return", seed=2)
    reply = ask(address, prompt="if x:", suffix="return", max_tokens=5, seed=2)
    assert reply["choices"][0]["text"] == filled.text[len("if x:") : -len("return")]
    whole = ask(address, template="if x:[MASK:5]return", seed=2)
    assert whole["choices"][0]["text"] == filled.text and whole["usage"] == reply["usage"]
    assert reply["usage"] == {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}


def test_frames_are_those_of_the_decoder(model, address):
    frames = list(generate(model, template="a[MASK:7]b", seed=4))
    events = stream(address, "/v1/frames", template="a[MASK:7]b", seed=4)
    shown = [[tuple(piece) for piece in event["rows"][0]["pieces"]] for event in events]
    assert shown == [frame.pieces() for frame in frames] and len(events) > 1
    assert [event["rows"][0]["ended_by"] for event in events] == [None] * (len(events) - 1) + ["length"]


@pytest.mark.parametrize("likelihood", ["causal", "block"])
def test_scores_are_those_of_the_likelihood_that_is_named(model, address, likelihood):
    reply = ask(address, "/v1/score", text=["abc", "x"], likelihood=likelihood)
    assert reply["likelihood"] == likelihood
    for said, nats in zip(reply["scores"], score(model, ["abc", "x"], likelihood=likelihood), strict=True):
        assert said["log_probs"] == pytest.approx(nats.tolist()) and said["total"] == pytest.approx(nats.sum().item())
        assert "".join(said["tokens"]) == said["text"]


def test_without_a_seed_texts_differ_and_can_be_had_again(address):
    one, two = (ask(address, prompt="a", max_tokens=24) for _ in range(2))
    assert one["seed"] != two["seed"] and one["choices"][0]["text"] != two["choices"][0]["text"]  # 2**-32, 256**-24
    again = ask(address, prompt="a", max_tokens=24, seed=one["seed"])
    assert again["choices"][0]["text"] == one["choices"][0]["text"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "give either a prompt or a template"),
        ({"prompt": "a", "template": "b"}, "give either a prompt or a template"),
        ({"prompt": 3}, "prompt is 3; it must be text or a list, each text"),
        ({"prompt": []}, "no prompt is given; a batch needs at least one row"),
        ({"prompt": "a", "max_token": 3}, "there is no setting max_token (did you mean max_tokens?); there are model"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
        ({"prompt": "a", "max_tokens": 9999}, "max_tokens is 9999; this server writes at most 4096"),
        ({"prompt": "a", "n": 0}, "n is 0; it must be 1 or more"),
        ({"prompt": "a", "n": 10**9}, f"the prompts and n make {10**9} texts; a request has at most 128"),
        ({"prompt": ["a"] * 65, "n": 2}, "the prompts and n make 130 texts; a request has at most 128"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1; it must be 0 (greedy), or"),
        ({"prompt": "a", "seed": -1}, "seed is -1; it must be 0 or more"),
        ({"prompt": "a", "logprobs": 5}, "logprobs is 5, which this server does not do; leave it out"),
        ({"prompt": "a", "echo": True}, "echo is true, which this server does not do; leave it out"),
        ({"prompt": "a", "stream": "yes"}, "stream is 'yes'; it must be true or false"),
        ({"prompt": "a", "decoder": "beam"}, "decoder is beam; it must be one of"),
        ({"prompt": "a", "settings": {"seed": 3}}, "settings has seed, which is not a decoder's own; give it beside"),
        ({"prompt": "a", "settings": [3]}, "settings is [3]; it must be an object"),
        ({"prompt": "a", "settings": {"steps": 3}}, "steps is set, but the decoder speculative has no such setting"),
        ({"prompt": "a", "stream_options": {"include_usage": 1}}, "stream_options.include_usage is 1; it must be true"),
        ({"prompt": "a", "stop": "\ud800"}, "the body is no JSON"),
        (
            {"prompt": "a", "max_tokens": 4, "stream": True, "decoder": "remasking"},
            "stream is true, beside decoder remasking, which draws again what stands",
        ),
        ({"template": "a"}, "the template has no [MASK] to fill"),
        ({"template": "a[MASK]", "max_tokens": 3}, "max_tokens is set, beside a template, whose holes say"),
        ({"template": "a[MASK]", "stream": True}, "stream is true, beside a hole, which is not filled left to right"),
        ({"prompt": ["a", "b"], "suffix": "c"}, "suffix is set, beside several prompts; give one"),
        ({"prompt": "a[MASK]", "suffix": "c"}, "prompt has [MASK], which would be a hole; give a template instead"),
        ({"prompt": "a", "suffix": "c", "stop": "d"}, "stop is set, beside a suffix"),
    ],
)
def test_what_is_refused(address, body, sentence):
    for more in ({}, {"stream": True}) if "stream" not in body and "suffix" not in body else ({},):
        code, said = refused(address, **body, **more) if body else refused(address, model=None, **more)
        assert code == 400 and said.startswith(sentence)


def test_what_is_no_request(address):
    for path, body, code, sentence in (
        ("/v1/completions", b"{", 400, "the body is no JSON"),
        ("/v1/completions", b"[1]", 400, "the body is list; it must be a JSON object"),
        ("/v1/completions", b'{"prompt": "a", "model": "large"}', 404, "model is large; this server has small"),
        ("/v1/completions", b'"' + b"a" * (1 << 22) + b'"', 413, "the body has more than 4194304 bytes"),
        ("/v1/score", b'{"likelihood": "block"}', 400, "text is not given"),
        ("/v1/score", b'{"text": "a", "likelihood": "diffusion"}', 400, "likelihood is diffusion; it must be one of"),
        ("/v1/chat/completions", b"{}", 404, "Not Found"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            opened(address, path, body)
        assert error.value.code == code and json.load(error.value)["error"]["message"].startswith(sentence)


def test_neutral_settings_of_other_clients_pass():
    given = {"prompt": "a", "echo": False, "frequency_penalty": 0.0, "logprobs": None, "user": "u", "best_of": 1}
    assert read(given, Completion) == Completion(prompt="a")
    with pytest.raises(InputError, match=r"best_of is 2, which this server does not do"):
        read({**given, "best_of": 2}, Completion)


def test_the_documents_requests_are_served(address):
    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    requests = re.findall(r"^curl.* http://127.0.0.1:8000(\S+) .*-d '(.*)'$", text, re.MULTILINE)
    assert len(requests) == text.count("\ncurl ") == 6
    for path, body in requests:
        asked = json.loads(body)
        if "text" in asked:
            asked["text"] = ["a"]  # this model's context is 32 bytes
        elif "template" not in asked:
            asked |= {"prompt": "ab", "max_tokens": 8} | ({"suffix": "c"} if "suffix" in asked else {})
        else:
            asked["template"] = "a[MASK:8] b[MASK:4]"
        with opened(address, path, asked) as reply:
            assert reply.status == 200 and reply.read()


# Batches of several requests.


class Batches:
    """`generate`, noting how many rows it got and how many steps were asked of it; it waits for `go`."""

    def __init__(self, model):
        self.model, self.rows, self.steps, self.go = model, [], 0, threading.Event()

    def __call__(self, **given):
        self.go.wait(20)
        self.rows.append(len(given.get("prompt", given.get("template"))))
        for frame in generate(self.model, **given):
            self.steps += 1
            yield frame


@pytest.fixture
def batches(model, monkeypatch):
    made = Batches(model)
    real = Worker.__init__

    def init(self, decode, *more):
        real(self, made, *more)
        made.worker = self

    monkeypatch.setattr(Worker, "__init__", init)
    return made


def until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_requests_share_batches_and_get_what_they_would_get_alone(model, batches):
    asked = [
        dict(prompt=prompt, max_tokens=new, seed=seed, temperature=warmth)
        for prompt, new, seed, warmth in [
            ("a", 5, 0, 1.0), ("bc", 13, 7, 1.0), ("d", 9, 7, 0.5), ("efgh", 3, 1, 1.0), ("i", 8, 2, 1.0)]
    ]  # fmt: skip
    with served(model, rows=3) as address, ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, address, prompt="first", max_tokens=2)
        until(lambda: batches.worker.current)  # it is being decoded, and held
        replies = []
        for each in asked:
            replies.append(pool.submit(partial(ask, address, **each)))
            until(lambda: len(batches.worker.waiting) == len(replies))
        batches.go.set()
        first.result()
        texts = [reply.result()["choices"][0]["text"] for reply in replies]
    assert batches.rows == [1, 3, 1, 1]  # three, the one that is colder, and one for which there was no room
    for each, text in zip(asked, texts, strict=True):
        new = each.pop("max_tokens")
        assert last(model, max_new_tokens=new, **each).text == text


def test_scores_take_their_turn(model, batches):
    with served(model) as address, ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, address, prompt="first", max_tokens=2)
        until(lambda: batches.worker.current)
        scored = pool.submit(partial(ask, address, "/v1/score", text="ab"))
        until(lambda: len(batches.worker.waiting) == 1)
        second = pool.submit(ask, address, prompt="b", max_tokens=2)
        until(lambda: len(batches.worker.waiting) == 2)
        assert not scored.done()
        batches.go.set()
        assert scored.result()["scores"][0]["total"] == pytest.approx(score(model, "ab")[0].sum().item())
        assert first.result()["choices"] and second.result()["choices"] and batches.rows == [1, 1]


def test_more_than_may_wait_is_told_to_come_again(model, batches):
    with served(model, rows=1, waiting=2) as address, ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(ask, address, prompt="a", max_tokens=2)]
        until(lambda: batches.worker.current)
        replies += [pool.submit(ask, address, prompt="a", max_tokens=2) for _ in range(2)]
        until(lambda: len(batches.worker.waiting) == 2)
        for asked in ({}, {"stream": True}):
            code, said = refused(address, prompt="a", max_tokens=2, **asked)
            assert code == 503 and said == "2 requests are waiting; try again later"
        batches.go.set()
        assert all(reply.result()["choices"] for reply in replies)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/frames"])
def test_who_no_longer_listens_is_no_longer_written_for(model, batches, path):
    batches.go.set()
    with served(model, longest=30_000) as address:
        reply = opened(
            address, path, {"prompt": "a", "max_tokens": 30_000, "stream": True, "decoder": "autoregressive"}
        )
        reply.readline()
        reply.close()
        assert ask(address, prompt="b", max_tokens=2)["choices"]
        assert batches.steps < 30_000


def test_what_fails_is_told_and_the_next_request_is_served(model):
    broken = text_model(scale=3.0)
    broken.model.causal.layers[0].mlp.up.weight.fill_(torch.nan)
    with served(broken) as address:
        for _ in range(2):
            code, said = refused(address, prompt="a", max_tokens=4)
            assert code == 500 and said.startswith("DecodingError: ")
        assert ask(address, "/health")["status"] == "ok"


# The command.


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    assert main(["serve", "nowhere"]) == 2
    said = f"caddf: error: {package} is not installed; caddf serve needs it: pip install 'caddf[serve]'\n"
    assert capsys.readouterr().err == said


def test_the_command_serves_until_it_is_interrupted(model, tmp_path):
    model.save_pretrained(tmp_path / "small")
    command = [sys.executable, "-m", "caddf", "serve", str(tmp_path / "small"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stderr.readline()
        assert said.startswith("small at http://127.0.0.1:") and said.endswith(" (Ctrl-C stops)\n"), said
        address = said.split()[2]
        assert ask(address, prompt="ab", max_tokens=5, seed=1)["choices"][0]["text"] == (
            last(caddf.load(tmp_path / "small"), "ab", max_new_tokens=5, seed=1).text
        )
        port = address.rsplit(":", 1)[1]
        taken = subprocess.run([*command[:-1], port], capture_output=True, text=True, check=False)
        assert taken.returncode == 2 and taken.stderr == (
            f"caddf: error: host and port are 127.0.0.1 and {port}, which cannot be used: Address already in use\n"
        )
        with opened(address, "/v1/completions", {"prompt": "a", "max_tokens": 4096, "stream": True}) as reply:
            reply.readline()
            process.send_signal(signal.SIGINT)
            assert reply.read().decode().endswith("data: [DONE]\n\n")  # whole, or told that the server stops
        assert process.wait(20) == 0 and process.stderr.read() == ""
    finally:
        process.kill()

"""sample.py --server against a local server: what is sent, what is kept, and one line for whatever the server does."""

import json
import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

import sample
from base import openai
from tests.conftest import flags, good
from tests.local_server import LocalServer

KEY = "sk-test-0123456789abcdef"
PROMPTS = [
    {"prompt": "zero", "id": 0},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}], "id": 1},
    {"prompt": "two", "answer": [2, "é"]},
    {"prompt": "three"},
    {"prompt": "four"},
]


class Server(LocalServer):
    """Completes a prompt by its last word and the seed. gives: most texts of an answer, 0 = as many as asked for.

    plan: last word -> what is answered to it first, second, … instead: (status, body).
    """

    def __init__(self):
        super().__init__(Handler)
        self.url, self.plan, self.gives, self.pause = f"{self.url}/v1", {}, 0, 0.0
        self.asked: list[tuple[str, dict, str | None]] = []  # (path, body, Authorization)

    def text(self, body: dict, k: int) -> str:
        return f" {word(body)} {body['seed']} {k}. END and more"

    def words(self) -> list[str]:
        """The last words of the prompts that were asked, in their order."""
        return sorted(word(body) for _, body, _ in self.asked)


def word(body: dict) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.lock:
            server.asked.append((self.path, body, self.headers.get("Authorization")))
            server.now += 1
            server.most = max(server.most, server.now)
            steps = server.plan.get(word(body), [])
            step = steps.pop(0) if steps else None
        time.sleep(server.pause)
        texts = [server.text(body, k) for k in range(body.get("n", 1))]
        texts = texts[: server.gives or None]
        key = "text" if self.path == "/v1/completions" else "message"
        choices = [{key: text if key == "text" else {"role": "assistant", "content": text}} for text in texts]
        status, data = step or (200, {"choices": choices, "usage": {"completion_tokens": 7 * len(texts)}})
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        with server.lock:
            server.now -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(openai, "DELAY", 0.01)
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def loaded(*_):
        raise AssertionError("a model or tokenizer was loaded")

    monkeypatch.setattr(sample, "build_model", loaded)
    monkeypatch.setattr(sample, "build_tokenizer", loaded)
    with Server() as server:
        yield server


@pytest.fixture
def asked(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    return path


def args(server, asked, /, **keys) -> list[str]:
    own = {"server": server.url, "server_model": "wise", "prompts": asked, "out": asked.parent / "out.jsonl", "n": 3, "seed": 5}
    return flags(**{**own, "max_new_tokens": 12, **keys})


def written(asked: Path) -> list[dict]:
    return [json.loads(line) for line in (asked.parent / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("gives", [0, 1, 2])
def test_n_completions_of_a_server_that_gives_all_or_fewer(server, asked, call, gives):
    """A text goes to completions, a conversation to chat/completions; the lines keep their fields, stop texts are cut."""
    server.gives = gives
    command = args(server, asked, stop="END", temperature=0.7)
    status, printed, err = call("sample", *command)
    assert status == 0 and "105 tokens" in printed and not err, err
    assert not list(asked.parent.glob("*.part*"))
    records = written(asked)
    assert [{**r, "completions": 0} for r in records] == [{**r, "completions": 0} for r in PROMPTS]
    for record in records:
        texts, last = record["completions"], record.get("prompt", "one")
        assert len(set(texts)) == 3 and all(t.startswith(f" {last} ") and t.endswith(". ") for t in texts)
    assert len(server.asked) == 5 * {0: 1, 1: 3, 2: 2}[gives]
    common = {"model": "wise", "max_tokens": 12, "temperature": 0.7}
    for path, body, _ in server.asked:
        assert path == ("/v1/chat/completions" if "messages" in body else "/v1/completions")
        assert body.items() >= common.items() and body["stop"] == ["END"]
        assert body.keys() - {"n"} == common.keys() | {"stop", "seed", "messages" if "messages" in body else "prompt"}
    assert next(body["messages"] for _, body, _ in server.asked if "messages" in body) == PROMPTS[1]["messages"]
    seeds = [body["seed"] for _, body, _ in server.asked]
    assert len(set(seeds)) == len(seeds), "two requests would draw the same"
    assert call("sample", *command)[0] == 0 and written(asked) == records
    assert call("sample", *args(server, asked, stop="END", seed=6))[0] == 0 and written(asked) != records


def test_keys_of_drawing_are_sent_where_they_are_set_and_greedy_asks_once(server, asked, call):
    assert call("sample", *args(server, asked, top_k=5, top_p=0.9, limit=1, server_model=None, model="runs/x/model"))[0] == 0
    body = server.asked.pop()[1]
    assert (body["top_k"], body["top_p"], body["n"], body["model"]) == (5, 0.9, 3, "runs/x/model")
    status, _, err = call("sample", *args(server, asked, temperature=0))
    assert status == 0 and not err and len(server.asked) == 5 and not any("n" in body for _, body, _ in server.asked)
    assert all(len(r["completions"]) == 3 and len(set(r["completions"])) == 1 for r in written(asked))


def test_a_server_that_does_not_draw_is_warned_of(server, asked, call):
    server.plan = {"zero": [(200, {"choices": [{"text": "a"}] * 3})]}
    status, _, err = call("sample", *args(server, asked, limit=1))
    assert status == 0 and "warning: all texts of a prompt are equal, at temperature 1.0" in err


def test_several_requests_at_a_time(server, asked, call):
    server.pause = 0.2
    assert call("sample", *args(server, asked, workers=3))[0] == 0
    assert server.most == 3


def test_a_stopped_run_goes_on_and_keeps_what_was_answered(server, asked, call, refused, tmp_path):
    server.plan = {"three": [(400, {"error": "context too long"})]}
    line = refused("sample", *args(server, asked), says="prompts.jsonl:4: http://127.0.0.1")
    assert "the server refuses (status 400" in line and "context too long" in line and "--server_model" in line
    assert not (tmp_path / "out.jsonl").exists()
    kept = (tmp_path / "out.jsonl.part0").read_text().splitlines()
    assert json.loads(kept[0]).items() >= {"server": server.url, "server_model": "wise", "n": 3, "seed": 5}.items()
    refused("sample", *args(server, asked, server_model="other"), says="with another server_model ('wise', here 'other')")
    before = len(server.asked)
    status, printed, _ = call("sample", *args(server, asked))
    assert status == 0 and f"{len(kept) - 1} finished before" in printed and len(kept) > 1
    assert len(server.asked) == before + 5 - (len(kept) - 1) and [len(r["completions"]) for r in written(asked)] == [3] * 5


ODD = [
    b"<html>busy</html>",
    b"[" * 90_000,
    b"null",
    {"choices": []},
    {"choices": None},
    {"choices": [None]},
    {"choices": [{"text": 5}]},
    {"choices": [{"text": {"a": "b"}}]},
    {"choices": [{"message": [1]}]},
    {"choices": "abc"},
    {"choices": {"text": "a"}},
]


def test_odd_answers_are_asked_again(server, asked, call, monkeypatch):
    monkeypatch.setattr(openai, "DELAY", 0)
    server.plan = {"two": [(200, body) for body in ODD] + [(500, b"oops"), (429, b"")]}
    status, _, err = call("sample", *args(server, asked, tries=len(ODD) + 3))
    assert status == 0 and server.words().count("two") == len(ODD) + 3, err
    assert all(isinstance(text, str) for record in written(asked) for text in record["completions"])


def test_one_prompt_without_an_answer_stops_no_other(server, asked, call, refused, tmp_path):
    server.plan = {"two": [(500, b"oops")] * 2}
    line = refused("sample", *args(server, asked, tries=2), says="1 prompt got no answer; ")
    assert "prompts.jsonl:3: no answer in 2 tries, the last: status 500: oops: start the same command again" in line
    assert server.words() == ["four", "one", "three", "two", "two", "zero"]
    status, printed, _ = call("sample", *args(server, asked))
    assert status == 0 and "4 finished before" in printed and len(server.asked) == 7


def test_the_key_goes_into_the_header_and_nowhere_else(server, asked, call, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server.plan = {"zero": [(401, f"wrong key {KEY}".encode()), (200, {"choices": [{"text": f"is it {KEY}?"}] * 3})]}
    line = refused("sample", *args(server, asked, api_key_env="MY_KEY"), says="wrong key ***")
    status, printed, err = call("sample", *args(server, asked, api_key_env="MY_KEY"))
    assert status == 0 and written(asked)[0]["completions"] == ["is it ***?"] * 3
    assert {key for _, _, key in server.asked} == {f"Bearer {KEY}"}
    assert KEY not in "".join([line, printed, err, *(p.read_text() for p in tmp_path.iterdir())])


def test_mistakes_end_in_one_line(server, asked, refused, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        refused("sample", *args(server, asked, server=nobody), says="it refuses the connection: check --server and the network")
    server.plan = {"zero": [(404, {"error": {"message": "The model `wise` does not exist."}})]}
    refused("sample", *args(server, asked), says="The model `wise` does not exist.")
    for keys, says in (
        ({"server": "ftp://x"}, "key server: not openai, gemini or an address"),
        ({"server": "http://me:SECRET@h/v1"}, "key server: not openai"),
        ({"server": None}, "missing key model"),
        ({"server": None, "model": "gpt2"}, "key server_model: it names a model at a server"),
        ({"server_model": None}, "missing key model"),
        ({"prompts": None, "out": None}, "key server: it completes the prompts of a file"),
        ({"prompts": None, "out": None, "chat": "true"}, "key server: it completes the prompts of a file"),
        ({"date": "2024-01-01"}, "the server has its own"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "no environment variable of that name"),
        ({"max_calls": 2, "overwrite": "true"}, "key max_calls: 2 calls were made"),
    ):
        assert "SECRET" not in refused("sample", *args(server, asked, **keys), says=says)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_two_processes_share_the_prompts(server, asked, call, world):
    assert call("sample", *args(server, asked))[0] == 0
    alone = written(asked)
    (asked.parent / "out.jsonl").unlink()
    server.asked.clear()
    good(world(2, "sample", args(server, asked)))
    assert written(asked) == alone and len(server.asked) == 5

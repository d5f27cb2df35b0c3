"""The client against a local server: retries, money, the cache, kills, and where the API key goes."""

import email.utils
import functools
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest
import requests

from base import openai
from base.errors import UserError
from base.http import is_local, retry_after
from base.openai import address, api_key
from judge.cache import Reply, open_cache
from tests.judge.server import Server, args, responses

ROOT = Path(__file__).parents[2]
KEY = "sk-test-0123456789abcdef"


def result(folder: Path) -> dict:
    return json.loads((folder / "out.json").read_text())


def start(*words: str, **env) -> subprocess.Popen:
    """eval_winrate.py in a process of its own, with an API key in its environment."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    # a shell starts its background jobs with SIGINT ignored, and what they start inherits that
    reset = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command, pipes = [sys.executable, "eval_winrate.py", *words], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env={**clean, "OPENAI_API_KEY": KEY, **env}, preexec_fn=reset, **pipes)


def wait_for(server, asked: int) -> None:
    deadline = time.monotonic() + 60
    while len(server.asked) < asked and time.monotonic() < deadline:
        time.sleep(0.05)


# --- every question gets an answer, or is reported --------------------------------------------------------------------


TROUBLE = {
    0: [(429, {"Retry-After": "1"}, b'{"error": {"message": "slow down"}}')],
    1: [(500, {}, b"oops"), (503, {}, b"")],
    2: ["garbage", "empty"],
    3: ["late"],
    4: [lambda v: f"Well. Response A has its points, and so has B. All in all,\n\n**my {v.lower()}**."],
    5: ["cut"],
    6: ["I cannot decide.", "Verdict: A\nVerdict: B"],
    7: ["hm", "hm", "hm"],
    8: [(429, {"Retry-After": email.utils.formatdate(time.time() - 60, usegmt=True)}, b"")],
}


def test_right_counts_whatever_the_server_does(server, call, tmp_path):
    server.plan = {n: list(steps) for n, steps in TROUBLE.items()}
    path, details = responses(tmp_path / "r.jsonl", 12, 9), tmp_path / "d.jsonl"  # question 7 would be a win
    command = args(server, path, timeout=0.4, details=details, workers=3)
    began = time.monotonic()
    status, _, err = call("eval_winrate", *command)
    assert status == 0 and "warning: 1 of 12 judgements failed" in err, err
    assert time.monotonic() - began >= 1, "Retry-After was heeded"
    found = result(tmp_path)
    assert [found[name] for name in ("n", "wins", "losses", "ties", "failed")] == [12, 8, 3, 0, 1]
    assert found["win_rate"] == pytest.approx(8 / 11)
    assert [server.count(n) for n in range(12)] == [2, 3, 3, 2, 1, 2, 3, 3, 2, 1, 1, 1] and server.most <= 3
    failed = json.loads(details.read_text().splitlines()[7])
    assert failed["outcome"] is None and failed["failed"] == ["no verdict in 3 replies"] and failed["replies"] == [["hm"] * 3]
    turns = [body["messages"] for n, body in server.asked if n == 6][2]
    assert [t["role"] for t in turns] == ["user", "assistant", "user"] and turns[1]["content"] == "Verdict: A\nVerdict: B"

    before = len(server.asked)
    assert call("eval_winrate", *command)[0] == 0 and len(server.asked) == before and result(tmp_path) == found


def test_a_dead_server_ends_it_and_one_lost_question_does_not(server, call, refused, tmp_path):
    path = responses(tmp_path / "r.jsonl", 10, 4)
    command = args(server, path, tries=2, workers=1)
    server.plan = {n: [(500, {}, b"overloaded")] * 2 for n in range(5, 8)} | {9: [(500, {}, b"")] * 2}
    line = refused("eval_winrate", *command, says="no answer in 2 tries, the last: status 500: overloaded")
    assert "the same command again" in line and not (tmp_path / "out.json").exists()
    status, _, err = call("eval_winrate", *command)
    assert status == 0 and "1 of them without an answer: the same command asks those again" in err
    assert (result(tmp_path)["wins"], result(tmp_path)["failed"]) == (4, 1)
    assert call("eval_winrate", *command)[0] == 0
    assert [server.count(n) for n in range(10)] == [1] * 5 + [3, 3, 3, 1, 3] and result(tmp_path)["failed"] == 0


def test_retry_after_in_seconds():
    def seconds(text: str) -> float:
        response = requests.Response()
        response.headers["Retry-After"] = text
        return retry_after(response)

    assert seconds("7") == 7 and seconds(" 1.5 ") == 1.5
    assert [seconds(text) for text in ("", "soon", "-3", "Fri, 31 Dec 1999 23:59:59 GMT")] == [0, 0, 0, 0]
    assert retry_after(None) == retry_after(requests.Response()) == 0


def test_what_no_second_try_can_mend_ends_at_once(server, refused, tmp_path, monkeypatch):
    """The server's words are shown, without the API key or parts of it."""
    command = args(server, responses(tmp_path / "r.jsonl", 9, 4))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    words = json.dumps({"error": {"message": f"Incorrect key: {KEY}, or sk-test-****cdef. See\nour site."}}).encode()
    for n, (status, headers, body, says) in enumerate(
        [
            (400, {}, words, "Incorrect key: ***, or *** See"),
            (401, {}, words, "check --judge, --judge_model and the API key in OPENAI_API_KEY"),
            (429, {}, b'{"error": {"message": "no quota", "code": "insufficient_quota"}}', "no quota"),
            (429, {"Retry-After": "7200"}, b"daily limit", "daily limit; it asks to wait 7200 s"),
            (400, {}, b"no \x1b[2J\x07\xe2\x80\xaemodel", "status 400: no [2J model"),
            (302, {"Location": "http://elsewhere.example.com/x?code=1"}, b"", "status 302"),
        ]
    ):
        server.always = (status, headers, body)
        line = refused("eval_winrate", *command, says=says)
        assert f"status {status}" in line and "sk-" not in line and "cdef" not in line and "code=1" not in line
        assert len(server.asked) == n + 1, "one call and no more"
        assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize("does", ["slow head", "slow body"])
def test_a_server_that_sends_a_byte_now_and_then_holds_nobody(server, refused, tmp_path, does):
    server.always = does
    began = time.monotonic()
    refused(
        "eval_winrate", *args(server, responses(tmp_path / "r.jsonl", 3, 1), timeout=0.5, tries=1), says="no answer in time"
    )
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("packed", [True, False])
def test_an_answer_of_any_size_takes_little_memory(server, refused, tmp_path, packed):
    body = gzip.compress(bytes(60_000_000), 1) if packed else b"x" * 60_000_000
    server.always = (200, {"Content-Encoding": "gzip"} if packed else {}, body)
    tracemalloc.start()
    try:
        says = "encoding that was not asked for" if packed else "an answer of more than 10,000,000 bytes"
        refused("eval_winrate", *args(server, responses(tmp_path / "r.jsonl", 3, 1), tries=1, workers=1), says=says)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def chat(content: object, **usage) -> tuple[int, dict, bytes]:
    """An answer with this content and count of tokens."""
    said = {"choices": [{"message": {"content": content}, "finish_reason": None}], **usage}
    return 200, {}, json.dumps(said).replace("Infinity", "1e999").encode()


def test_odd_answers_are_asked_again_or_counted_as_they_can_be(server, call, tmp_path, monkeypatch):
    """And never kept: what is kept answers the same command the next time."""
    monkeypatch.setattr(openai, "DELAY", 0)
    right = "Verdict: " + "AB"[Random("0 0 0").choice("AB") == "B"]
    odd = [{"verdict": "A"}, 5, True, [["Verdict: A"]], [{"text": 3}], [{"text": {"verdict": "A"}}]]
    bodies = [
        b'{"choices": null}',
        b'{"choices": [null]}',
        b'{"choices": [{"message": [1]}]}',
        b"[" * 90_000,
        b"9" * 9_000,
        b"null",
    ]
    counts = [1e999, float("nan"), -1, "7", True, None, 10**30, [1], 7.5]
    steps = [*map(chat, odd), *((200, {}, body) for body in bodies)]
    server.plan = {0: [*steps, chat(right)]}
    server.plan |= {i: [chat(right, usage={"prompt_tokens": n, "completion_tokens": 3})] for i, n in enumerate(counts, 1)}
    server.plan |= {10: [chat(right, usage=5)], 11: [chat(right, usage=None)]}
    command = args(server, responses(tmp_path / "r.jsonl", 12, 6), tries=len(steps) + 1)
    status, _, err = call("eval_winrate", *command)
    assert status == 0 and [server.count(n) for n in range(12)] == [len(steps) + 1] + [1] * 11, err
    found = result(tmp_path)
    assert found["failed"] == 0 and found["usage"] == {"calls": 12, "tokens_in": 0, "tokens_out": 3 * len(counts)}
    asked = len(server.asked)
    assert call("eval_winrate", *command)[0] == 0 and len(server.asked) == asked and result(tmp_path) == found


def test_a_judge_that_refuses_the_connection(server, refused, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        line = refused("eval_winrate", *args(server, responses(tmp_path / "r.jsonl", 9, 1), judge=url), says=url)
    assert "it refuses the connection: check --judge" in line and [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


# --- money ------------------------------------------------------------------------------------------------------------


def test_estimate_cost_and_max_calls(server, call, refused, tmp_path):
    path = responses(tmp_path / "r.jsonl", 8, 4)
    prices = {"price_in": 1000, "price_out": 2000, "max_tokens": 10, "temperature": -1}
    status, printed, _ = call("eval_winrate", *args(server, path, dry_run="true", **prices))
    assert status == 0 and not server.asked and sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl"]
    tokens = int(re.search(r"8 calls to .*: about ([\d,]+) tokens in, at most 80 out", printed)[1].replace(",", ""))
    assert 8 * 150 < tokens < 8 * 250 and f"about {(tokens * 1000 + 80 * 2000) / 1e6:.4f} at the prices" in printed
    server.plan = {5: ["?"], 6: [(500, {}, b"")]}
    command = args(server, path, workers=1, **prices)
    line = refused("eval_winrate", *command, "--max_calls", "8", says="max_calls: 8 calls were made")
    assert "out.cache.jsonl" in line and not (tmp_path / "out.json").exists()
    status, printed, _ = call("eval_winrate", *command, "--max_calls", "1")
    assert status == 0 and "1 calls to" in printed and "asked now: 1 calls" in printed
    assert [server.count(n) for n in range(8)] == [1, 1, 1, 1, 1, 2, 2, 1]
    used = {"calls": 9, "tokens_in": 900, "tokens_out": 63, "cost": pytest.approx((900 * 1000 + 63 * 2000) / 1e6)}
    assert result(tmp_path)["usage"] == used and server.asked[0][1].keys() == {"model", "messages", "max_tokens"}


# --- kills, damage, two at a time -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_asked_twice(server, call, tmp_path):
    server.plan = {6: ["hang"]}
    command = args(server, responses(tmp_path / "r.jsonl", 9, 5), workers=1)
    process = start(*command)
    wait_for(server, 7)
    process.kill()
    said = b"".join(process.communicate())
    assert len(server.asked) == 7 and not (tmp_path / "out.json").exists(), said
    assert call("eval_winrate", *command)[0] == 0
    assert [server.count(n) for n in range(9)] == [1, 1, 1, 1, 1, 1, 2, 1, 1] and result(tmp_path)["wins"] == 5
    assert KEY.encode() not in said + b"".join(p.read_bytes() for p in tmp_path.iterdir())


@pytest.mark.slow
def test_interrupted_it_stops_soon_and_keeps_what_was_answered(server, tmp_path):
    server.pause = 0.15
    process = start(*args(server, responses(tmp_path / "r.jsonl", 200, 5), workers=2))
    wait_for(server, 6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in err and b"interrupted" in err, err
    assert len((tmp_path / "out.cache.jsonl").read_text().splitlines()) == len(server.asked) < 20


def test_of_several_processes_one_asks(server, tmp_path):
    process = start(*args(server, responses(tmp_path / "r.jsonl", 3, 2)), RANK="1", WORLD_SIZE="2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not server.asked, err


def test_damaged_lines_are_asked_again(server, call, tmp_path):
    command, cache = args(server, responses(tmp_path / "r.jsonl", 6, 2)), tmp_path / "out.cache.jsonl"
    assert call("eval_winrate", *command)[0] == 0
    whole = cache.read_bytes().splitlines(keepends=True)
    cache.write_bytes(whole[0] + b'{"key": "x"\n[1]\n' + b"".join(whole[1:4]) + whole[4][:-30])
    status, _, err = call("eval_winrate", *command)
    assert status == 0 and "3 damaged lines are skipped" in err and len(server.asked) == 6 + 2
    assert call("eval_winrate", *command)[0] == 0 and len(server.asked) == 8


@pytest.mark.parametrize("n", [1, 3])
def test_poisoned_lines_are_asked_again(server, call, tmp_path, n):
    command, cache = args(server, responses(tmp_path / "r.jsonl", n, 1)), tmp_path / "out.cache.jsonl"
    assert call("eval_winrate", *command)[0] == 0
    keys = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
    for fields in (
        '"text": {"verdict": "A"}',
        '"text": "Verdict: A", "tokens_in": 1e999',
        '"text": "x", "tokens_out": true',
        "",
    ):
        cache.write_text("".join(f'{{"key": "{key}", {fields}}}\n' for key in keys))
        asked = len(server.asked)
        status, _, err = call("eval_winrate", *command)
        assert status == 0 and err.count("warning: ") == 1 and f"{n} damaged lines are skipped" in err, err
        assert len(server.asked) == asked + n and result(tmp_path)["wins"] == 1


def test_a_cache_is_one_process_own_and_no_other_file_is_written_to(tmp_path):
    path, notes = tmp_path / "sub" / "c.jsonl", tmp_path / "notes.jsonl"
    with open_cache(path) as cache:
        cache.put("a", Reply("één", 1, 2, "ended by length"))
        with pytest.raises(UserError, match="another evaluation is using it"), open_cache(path):
            pass
    with open_cache(path) as cache:
        assert cache.found == {"a": Reply("één", 1, 2, "ended by length")}
    notes.write_text("my notes")
    with pytest.raises(UserError, match="holds no answers of a judge"), open_cache(notes):
        pass
    assert notes.read_text() == "my notes" and sorted(p.name for p in tmp_path.rglob("*")) == ["c.jsonl", "notes.jsonl", "sub"]


# --- address and key --------------------------------------------------------------------------------------------------


def test_addresses():
    for given, posted in {
        "http://h": "http://h/v1",
        "http://h:1/v1/": "http://h:1/v1",
        "http://[::1]:8000/api": "http://[::1]:8000/api",
        "https://h/api/v1/chat/completions": "https://h/api/v1",
        "http://h:1/v1/completions": "http://h:1/v1",
        "openai": "https://api.openai.com/v1",
        "gemini": "https://generativelanguage.googleapis.com/v1beta/openai",
    }.items():
        assert address(given, "judge") == posted
    for wrong in ("ftp://x", "h", "https://", "https://h/v1?key=SECRET", "https://me:SECRET@h/v1"):
        with pytest.raises(UserError, match="key judge: not openai, gemini or an address") as caught:
            address(wrong, "judge")
        assert "SECRET" not in str(caught.value)


def test_which_key_is_sent_where(monkeypatch, capsys):
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)

    def sent(url: str, variable: str = "OPENAI_API_KEY", named: bool = False) -> str:
        return api_key(variable, urlsplit(url), named)

    for value, variable, url, named, says in (
        ("", "SECRET", "https://h/v1", True, "no environment variable of that name"),
        ("", "OPENAI_API_KEY", address("openai", "judge"), False, "environment variable OPENAI_API_KEY: not set"),
        ("", "GEMINI_API_KEY", address("gemini", "judge"), False, "environment variable GEMINI_API_KEY: not set"),
        ("SECRET\ncd", "OPENAI_API_KEY", "https://h", False, "holds a character that no API key has"),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", value)
        with pytest.raises(UserError, match=says) as caught:
            sent(url, variable, named)
        assert "SECRET" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert sent("http://gpu.example.com/v1") == "" and "is not sent" in capsys.readouterr().out
    assert sent("https://gpu.example.com") == sent("http://127.0.0.1:1") == sent("http://gpu.example.com", named=True) == KEY


def test_what_is_for_this_machine_meets_no_proxy(server, call, tmp_path, monkeypatch):
    """A proxy would read the key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    path = responses(tmp_path / "r.jsonl", 3, 2)
    with Server() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert call("eval_winrate", *args(server, path))[0] == 0
        assert len(server.asked) == 3 and not proxy.asked and server.heads[0][1]["Authorization"] == f"Bearer {KEY}"
        command = args(server, path, judge="http://judge.example.com", cache=tmp_path / "c")  # an address elsewhere goes there
        assert call("eval_winrate", *command)[0] == 0
        assert len(proxy.asked) == 3 and all("Authorization" not in head for _, head in proxy.heads)
    local = {
        "127.0.0.1": True,
        "127.8.9.1": True,
        "[::1]": True,
        "localhost": True,
        "10.0.0.1": False,
        "localhost.example.com": False,
    }
    assert {host: is_local(f"http://{host}:1/v1") for host in local} == local


def test_the_key_goes_into_the_header_and_nowhere_else(server, call, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("default login me password other\n")
    server.plan = {0: [lambda v: f"You sent {KEY}. {v}"], 1: [(500, {}, KEY.encode())] * 6, 2: [f"{KEY}?"] * 3}
    path, folder = responses(tmp_path / "r.jsonl", 5, 4), tmp_path / "o"
    files = {"details": folder / "d.jsonl", "table": folder / "t.md", "out": folder / "out.json"}
    status, printed, err = call("eval_winrate", *args(server, path, api_key_env="MY_KEY", **files))
    assert status == 0 and {head["Authorization"] for _, head in server.heads} == {f"Bearer {KEY}"}
    assert len(list(folder.iterdir())) == 4 and "You sent ***. Verdict" in (folder / "d.jsonl").read_text()
    assert KEY not in "".join([printed, err, *(p.read_text() for p in folder.iterdir())])

    for key, sent in (("A", "Bearer A"), ("", None)):  # a word for a local server is no secret; without one none is sent
        monkeypatch.setenv("OPENAI_API_KEY", key)
        server.heads.clear()
        assert call("eval_winrate", *args(server, path, cache=tmp_path / f"cache{key}"))[0] == 0
        assert {head.get("Authorization") for _, head in server.heads} == {sent} and result(tmp_path)["wins"] == 4

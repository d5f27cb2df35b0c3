"""A judge for the tests: a local server with OpenAI's protocol that answers rightly, late, with an error, nonsense or half."""

import contextlib
import json
import re
import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.conftest import flags
from tests.local_server import LocalServer


class Server(LocalServer):
    """Prompts are "question N". Of two texts it prefers the one with "good" in it; a text's grade is the number in it.

    plan: N -> what it does the first, second, … time it is asked; after that it answers rightly. always: what it does
    each time. Each is a status with headers and body, a text to say, a function of the right answer, or "late", "hang",
    "garbage", "empty", "cut", "slow head", "slow body".
    """

    def __init__(self):
        super().__init__(Handler)
        self.plan: dict[int, list] = {}
        self.always = None
        self.pause = 0.0
        self.asked: list[tuple[int, dict]] = []  # (question, body), in the order in which they came
        self.heads: list[tuple[str, dict]] = []  # (path, headers)

    def handle_error(self, *_):
        """A client that hangs up is no news."""

    def count(self, number: int) -> int:
        return sum(n == number for n, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        number, server = int(re.search(r"question (\d+)", text)[1]), self.server
        with server.lock:
            steps, tried = server.plan.get(number, []), server.count(number)
            server.asked.append((number, body))
            server.heads.append((self.path, dict(self.headers)))
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.pause)
        try:
            self.act(server.always or (steps[tried] if tried < len(steps) else None), right(text))
        finally:
            with server.lock:
                server.now -= 1

    def act(self, does, answer: str):
        if isinstance(does, tuple):
            status, headers, data = does
            return self.send(status, data, headers)
        if does in ("garbage", "empty"):
            return self.send(200, b"<html>busy</html>" if does == "garbage" else b'{"choices": []}')
        if does in ("slow head", "slow body"):
            return self.trickle(does == "slow head")
        if does in ("late", "hang"):
            time.sleep(1.0 if does == "late" else 60)
        elif callable(does):
            answer = does(answer)
        elif does not in (None, "cut"):
            answer = does
        said = {
            "choices": [{"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7},
        }
        data = json.dumps(said).encode()
        if does != "cut":
            return self.send(200, data)
        self.send(200, data[: len(data) // 2], {"Content-Length": str(len(data))})
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, data: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)

    def trickle(self, head: bool):
        """A byte every tenth of a second, for half a minute."""
        start = b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(start + (b"X-Slow: " if head else b"\r\n"))
            for _ in range(300):
                self.wfile.write(b"x")
                time.sleep(0.1)
        self.close_connection = True

    def log_message(self, *_):
        pass


def right(text: str) -> str:
    """The verdict of a judge that knows."""
    if "<reference-" in text:
        return "Score: " + re.search(r"<response-\w+>\n.*?(\d+)", text)[1]
    return "Verdict: " + ("A" if "good" in re.search(r"<response_a-\w+>\n(.*)\n", text)[1] else "B")


def lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def responses(path: Path, n: int, wins: int) -> Path:
    """A file of `n` responses of which the first `wins` are better than the chosen answer."""
    records = []
    for i in range(n):
        ours, theirs = ("a good one", "a poor text") if i < wins else ("poor", "the good one")
        records.append({"prompt": f"question {i}", "chosen": " " + theirs, "completions": [" " + ours]})
    return lines(path, *records)


def args(server: Server, path: Path, **keys) -> list[str]:
    """The command line of eval_winrate.py that judges a file of responses; the result goes to out.json beside it."""
    return flags(**{"responses": path, "judge": server.url, "judge_model": "wise", "out": path.parent / "out.json", **keys})

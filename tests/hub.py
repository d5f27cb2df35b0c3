"""A small web server that speaks the Hugging Face hub's paths, for tests and for trying things out without the hub.

As the real one it answers `/{repo}/resolve/main/{file}`, redirects bare names (`gpt2`) to `openai-community/…`, states
size and checksum, and sends large files (by their ending) through a redirect to another host, whose ETag is one of its
own. Of data sets it lists the files (`/api/datasets/{repo}`) and those of the branch refs/convert/parquet, which are in the
folder of that name (`/api/datasets/{repo}/parquet`).
By hand: `python -m tests.hub FOLDER PORT [REPO]`, then `HF_ENDPOINT=http://localhost:PORT HF_HUB_CACHE=/none`.
"""

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".gz", ".parquet")
CONVERTED = "refs/convert/parquet"


@dataclass
class Fault:
    """What goes wrong with the requests whose path contains `path`, `times` times (-1: always)."""

    path: str
    times: int = 1
    status: int = 0  # answer with this status
    headers: dict = field(default_factory=dict)  # add or replace these headers
    cut: int = -1  # close the connection after so many bytes of the body
    slow: int = -1  # after so many bytes of the body send one every tenth of a second, for half a minute
    hang_up: bool = False  # close it without an answer
    sleep: float = 0.0  # seconds to wait before the answer


@dataclass
class Request:
    method: str
    path: str
    host: str
    headers: dict
    status: int = 0


class Hub:
    """`with Hub({"gpt2": folder}) as hub:` serves the folder's files at `hub.url`; {"*": folder} serves any repo id.

    `hub.requests` lists what was asked. `hub.fault(path, …)` makes something go wrong.
    Plain files, for a server that is no hub: `hub.url + "/files/{repo}/{file}"`.
    """

    def __init__(self, repos: dict[str, Path], port: int = 0):
        self.repos = {repo: Path(folder) for repo, folder in repos.items()}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.with_etag = self.heeds_if_range = True
        self.token = ""  # without it the hub's own host shows nothing
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that hung up
        # Two names for one machine: the hub's own host, and the one large files are kept at.
        self.url = f"http://localhost:{self.server.server_port}"
        self.store = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, path: str, **what) -> None:
        """Add a Fault, see there."""
        self.faults.append(Fault(path, **what))

    def asked(self, text: str) -> list[Request]:
        """The requests whose path contains `text`."""
        return [request for request in self.requests if text in request.path]

    def file(self, repo: str, name: str) -> Path | None:
        folder = self.repos.get(repo) or self.repos.get(repo.removeprefix("openai-community/")) or self.repos.get("*")
        path = folder / name if folder else None
        return path if path and path.is_file() else None

    def find(self, path: str) -> Path | None:
        """The file of "{repo}/{name}", wherever the repository's name ends."""
        parts = path.split("/")
        cuts = (("/".join(parts[:i]), "/".join(parts[i:])) for i in range(len(parts) - 1, 0, -1))
        return next((file for repo, name in cuts if (file := self.file(repo, name))), None)

    def take_fault(self, path: str) -> Fault:
        for fault in self.faults:
            if fault.path in path and fault.times:
                fault.times -= 1
                return fault
        return Fault(path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.request_ = Request(self.command, path, self.headers.get("Host", ""), dict(self.headers))
        self.hub.requests.append(self.request_)
        self.fault = self.hub.take_fault(path)
        if self.fault.sleep:
            time.sleep(self.fault.sleep)
        if self.fault.hang_up:
            self.close_connection = True
        elif self.fault.status:
            self.answer(self.fault.status)
        elif self.hub.token and not path.startswith("/store") and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            self.answer(401)
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)", path):
            self.list_files(f"datasets/{match[1]}")
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/parquet", path):
            self.list_converted(f"datasets/{match[1]}")
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/parquet/(.+)/(\d+)\.parquet", path):
            self.redirect(
                302, f"/datasets/{match[1]}/resolve/{quote(CONVERTED, safe='')}/{quote(match[2])}/{match[3]:0>4}.parquet", {}
            )
        elif match := re.fullmatch(r"/([^/]+)/resolve/main/(.+)", path):
            self.redirect(307, f"/openai-community/{match[1]}/resolve/main/{match[2]}", {})
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/(?:main/|[0-9a-f]{40}/|(?=refs/))(.+)", path):
            self.resolve(*match.groups())
        elif match := re.fullmatch(r"/(?:store|files)/(.+)", path):
            if file := self.hub.find(match[1]):
                content = file.read_bytes()
                self.send(content, hashlib.md5(content).hexdigest(), {})
            else:
                self.answer(404)
        else:
            self.answer(404)

    do_HEAD = do_GET

    def resolve(self, repo: str, name: str) -> None:
        file = self.hub.file(repo, name)
        if file is None:
            known = any(repo.removeprefix("openai-community/") == key or key in (repo, "*") for key in self.hub.repos)
            self.answer(404 if known else 401, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
            return
        content = file.read_bytes()
        about = {"X-Repo-Commit": COMMIT}
        if name.endswith(LARGE):
            about |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
            self.redirect(302, f"{self.hub.store}/store/{repo}/{name}?signature=secret", about)
        else:
            self.send(content, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), about)

    def list_files(self, repo: str) -> None:
        folder = self.hub.repos.get(repo)
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder else []
        siblings = [{"rfilename": name} for name in names if not name.startswith("refs/")]
        self.answer_json(200 if folder else 401, {"id": repo, "siblings": siblings} if folder else {"error": "not found"})

    def list_converted(self, repo: str) -> None:
        folder, found = self.hub.repos.get(repo, Path("/none")) / CONVERTED, {}
        for path in sorted(folder.glob("*/*/*.parquet")):
            config, split = path.parts[-3:-1]
            urls = found.setdefault(config, {}).setdefault(split, [])
            urls.append(f"https://huggingface.co/api/{repo}/parquet/{config}/{split}/{len(urls)}.parquet")
        self.answer_json(200 if found else 404, found or {"error": "not found"})

    def answer_json(self, status: int, value: dict) -> None:
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def redirect(self, status: int, to: str, headers: dict) -> None:
        self.answer(status, {"Location": to, **headers})

    def send(self, content: bytes, etag: str, headers: dict) -> None:
        """The content or the range of it that was asked for; If-Range is honoured."""
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **headers} if self.hub.with_etag else headers
        headers |= self.fault.headers
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, headers.get("ETag")) or not self.hub.heeds_if_range
        if not (wanted and same):
            self.answer(200, headers, content)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, headers, content[start : end + 1])

    def answer(self, status: int, headers: dict | None = None, body: bytes = b"") -> None:
        self.request_.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {}) | self.fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if 0 <= self.fault.cut < len(body):
            body = body[: self.fault.cut]
            self.close_connection = True
        with contextlib.suppress(ConnectionError):  # a client that gave up
            if self.fault.slow >= 0:
                self.close_connection = True
                self.wfile.write(body[: self.fault.slow])
                for byte in body[self.fault.slow :][:300]:
                    threading.Event().wait(0.1)  # not sleep, which tests replace
                    self.wfile.write(bytes([byte]))
                return
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(repos: dict[str, Path], monkeypatch) -> Iterator[Hub]:
    """A running Hub that HF_ENDPOINT points to. Proxies, tokens and the hub cache of the machine do not count."""
    with Hub(repos) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", "/none")
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@contextlib.contextmanager
def answering(reply: Callable[[dict], dict]) -> Iterator[str]:
    """A server that answers every POST of a JSON object with `reply(object)`, as JSON; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.dumps(reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m tests.hub FOLDER PORT [REPO, default any]")
    with Hub({sys.argv[3] if len(sys.argv) == 4 else "*": Path(sys.argv[1])}, int(sys.argv[2])) as hub:
        print(f"export HF_ENDPOINT={hub.url}", flush=True)
        seen = 0
        while True:
            time.sleep(0.2)
            for request in hub.requests[seen:]:
                print(request.method, request.path, request.status, flush=True)
                seen += 1

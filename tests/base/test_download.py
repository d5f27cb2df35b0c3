"""Downloads against a local server: resumed, checked, whole or absent, and one plain line for what goes wrong."""

import email.utils
import hashlib
import resource
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from base import download
from base.download import NotFound, fetch, hub_file, hub_find
from base.errors import UserError
from tests.hub import serving

CONTENT = np.random.default_rng(0).bytes(1_500_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "DELAY", 0.001)
    monkeypatch.setattr(download, "TIMEOUT", (2, 2))
    monkeypatch.setattr(download, "TRIES", 3)
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "big.bin").write_bytes(CONTENT)
    (folder / "small.json").write_text('{"a": 1}\n')
    (folder / "empty.txt").write_bytes(b"")
    with serving({"gpt2": folder, "datasets/org/set": folder}, monkeypatch) as hub:
        hub.folder = folder
        yield hub


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "down" / "big.bin"


@pytest.fixture
def waits(monkeypatch):
    """The seconds of each pause between tries; nothing is slept."""
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


def plain(hub, name="big.bin"):
    return f"{hub.url}/files/gpt2/{name}"


def left(dest):
    return sorted(path.name for path in dest.parent.iterdir() if path.name != ".lock")


def cut_once(hub, dest, monkeypatch, after=1_000_000):
    """A fetch that dies after so many bytes; leaves the partial file, and returns its size."""
    hub.fault("files", cut=after)
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(UserError, match=r"the connection was cut .*: start the same command again") as error:
        fetch(plain(hub), dest)
    monkeypatch.setattr(download, "TRIES", 3)
    assert left(dest) == ["big.bin.partial", "big.bin.partial.etag"]
    have = (dest.parent / "big.bin.partial").stat().st_size
    assert f"goes on after {have:,} bytes" in str(error.value) and after - download.CHUNK <= have <= after
    return have


def test_a_file_is_fetched_once(hub, dest):
    assert fetch(plain(hub), dest, sha256=SHA.upper()) == dest
    assert dest.read_bytes() == CONTENT and left(dest) == ["big.bin"]
    assert fetch(plain(hub), dest) == dest and fetch(plain(hub), dest, sha256=SHA) == dest
    assert len(hub.requests) == 1, "a file that is there needs no request"
    dest.write_bytes(b"old")
    assert fetch(plain(hub), dest).read_bytes() == b"old"
    assert fetch(plain(hub), dest, sha256=SHA).read_bytes() == CONTENT, "other content than asked for is replaced"
    dest.unlink()
    assert fetch(plain(hub, "empty.txt"), dest).read_bytes() == b""
    with pytest.raises(UserError, match=f"checksum is not {'0' * 64}"):
        fetch(plain(hub), dest.with_name("wrong"), sha256="0" * 64)
    assert left(dest) == ["big.bin"], "wrong content is deleted"


def test_cut_is_resumed_within_the_call(hub, dest):
    hub.fault("files", cut=1_000_000)
    fetch(plain(hub), dest, sha256=SHA)
    first, second = hub.asked("files")
    assert "Range" not in first.headers and second.status == 206
    start = int(second.headers["Range"].removeprefix("bytes=").rstrip("-"))
    assert 1_000_000 - download.CHUNK <= start + 1 <= 1_000_000
    assert second.headers["If-Range"] == f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert left(dest) == ["big.bin"]


def test_cut_is_resumed_by_the_next_call(hub, dest, monkeypatch):
    have = cut_once(hub, dest, monkeypatch)
    fetch(plain(hub), dest, sha256=SHA)
    assert hub.requests[-1].status == 206 and hub.requests[-1].headers["Range"] == f"bytes={have - 1}-"
    dest.unlink()
    cut_once(hub, dest, monkeypatch)
    (dest.parent / "big.bin.partial").write_bytes(CONTENT)  # whole already, but not renamed
    fetch(plain(hub), dest, sha256=SHA)
    assert hub.requests[-1].headers["Range"] == f"bytes={len(CONTENT) - 1}-"


def test_a_server_that_sends_a_byte_now_and_then_is_asked_again(hub, dest, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (1, 1))
    hub.fault("files", slow=1_000_000)
    began = time.monotonic()
    fetch(plain(hub), dest, sha256=SHA)
    assert [request.status for request in hub.requests] == [200, 206] and time.monotonic() - began < 8


def test_what_was_not_asked_for_packed_is_not_unpacked(hub, dest):
    """A small answer could fill the disk."""
    hub.fault("files", times=-1, headers={"Content-Encoding": "gzip"})
    with pytest.raises(UserError, match="an answer in an encoding that was not asked for"):
        fetch(plain(hub), dest)
    assert left(dest) == []


def test_a_mirror_on_this_machine_meets_no_proxy(hub, dest, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("NO_PROXY")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody is there
    assert hub_file("gpt2", "small.json").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("changed", [CONTENT[::-1], CONTENT[:1000]])
@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_changed_file_starts_over(hub, dest, monkeypatch, changed, heeds_if_range):
    cut_once(hub, dest, monkeypatch)
    hub.heeds_if_range = heeds_if_range
    (hub.folder / "big.bin").write_bytes(changed)
    assert fetch(plain(hub), dest).read_bytes() == changed
    wrong = 206 if len(changed) > 1000 else 416
    assert [request.status for request in hub.requests[1:]] == ([200] if heeds_if_range else [wrong, 200])


def test_wrong_range_starts_over(hub, dest, monkeypatch):
    cut_once(hub, dest, monkeypatch)
    hub.fault("files", headers={"Content-Range": "bytes 5-9/10"})
    fetch(plain(hub), dest, sha256=SHA)
    assert [request.status for request in hub.requests[1:]] == [206, 200]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_a_cut_starts_over(hub, dest, etag):
    hub.with_etag = False
    hub.fault("files", cut=1_000_000, headers={"ETag": etag} if etag else {})
    fetch(plain(hub), dest, sha256=SHA)
    assert [request.status for request in hub.requests] == [200, 200]
    assert not any("Range" in request.headers for request in hub.requests)


def test_cuts_end_when_nothing_new_comes(hub, dest):
    hub.fault("files", cut=200_000, times=5)
    fetch(plain(hub), dest, sha256=SHA)
    assert len(hub.requests) == 6, "more tries than three, each of which brought something"
    dest.unlink()
    hub.fault("files", cut=1, times=-1)
    with pytest.raises(UserError, match="the connection was cut"):
        fetch(plain(hub), dest)
    assert len(hub.requests) <= 6 + 4


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"hang_up": True}])
def test_busy_server_is_asked_again(hub, dest, fault):
    hub.fault("files", times=2, **fault)
    fetch(plain(hub), dest, sha256=SHA)
    assert len(hub.requests) == 3


def test_retry_after(hub, dest, waits):
    for header in ("7", email.utils.formatdate(time.time() + 20, usegmt=True), "86400", "soon"):
        hub.fault("files", status=429, headers={"Retry-After": header})
        fetch(plain(hub), dest).unlink()
    assert waits[0] == 7 and 15 < waits[1] <= 20 and waits[2:] == [download.LONGEST, download.DELAY]


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"status": 503}, "status 503 .*: check the address and the network and try again"),
        ({"status": 404}, "no such file there .404."),
        ({"status": 401}, "status 401; check the name, .* set HF_TOKEN"),
        ({"hang_up": True}, "the connection was cut .host localhost:.* put the file at .*big.bin"),
        ({"sleep": 1.0}, "no answer in time .host localhost:"),
    ],
)
def test_refused(hub, dest, monkeypatch, fault, message):
    monkeypatch.setattr(download, "TIMEOUT", (0.3, 0.3))
    hub.fault("files", times=-1, **fault)
    with pytest.raises(UserError, match=message) as error:
        fetch(plain(hub), dest)
    assert isinstance(error.value, NotFound) == (fault.get("status") == 404)
    assert plain(hub) in str(error.value) and "\n" not in str(error.value)
    assert left(dest) == []


def test_nobody_there(hub, dest, waits):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url, message in (
        (f"http://127.0.0.1:{port}/x", f"refuses the connection .host 127.0.0.1:{port}.: check .* put the file at .*big.bin"),
        ("http://nowhere.invalid/x", r"no such host .host nowhere\.invalid"),
        ("nowhere/x", "no usable address"),
    ):
        with pytest.raises(UserError, match=message):
            fetch(url, dest)
    assert left(dest) == [] and not waits


def test_network_that_goes_away_keeps_what_came(hub, dest, monkeypatch):
    hub.fault("files", cut=1_000_000)
    waits = []
    monkeypatch.setattr(download.time, "sleep", lambda wait: (waits.append(wait), hub.server.server_close()))
    with pytest.raises(
        UserError, match=r"refuses the connection .*: start the same command again, it goes on after [\d,]+ bytes"
    ):
        fetch(plain(hub), dest)
    assert left(dest) == ["big.bin.partial", "big.bin.partial.etag"]
    assert waits == [0.001, 0.002], "the network may come back"


def test_disk_that_is_full_or_cannot_be_written(hub, dest, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.*NANOPREF_CACHE"):
        fetch(plain(hub), tmp_path / "file" / "big.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # the nearest to a full disk that needs no rights
    try:
        with pytest.raises(UserError, match=r"cannot write .*big\.bin\.partial: File too large; make room there"):
            fetch(plain(hub), dest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not dest.exists()
    fetch(plain(hub), dest, sha256=SHA)
    assert hub.requests[-1].status == 206


@pytest.mark.slow
def test_processes_and_threads_fetch_one_file_once(hub, dest):
    hub.fault("files", sleep=1.0, times=-1)
    code = "import sys; from base.download import fetch; fetch(sys.argv[1], sys.argv[2])"
    running = [subprocess.Popen([sys.executable, "-c", code, plain(hub), str(dest)]) for _ in range(2)]
    threads = [threading.Thread(target=fetch, args=(plain(hub), dest)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in running] == [0, 0]
    assert dest.read_bytes() == CONTENT and left(dest) == ["big.bin"] and len(hub.requests) == 1


# the hub


def test_hub_file(hub, tmp_path):
    hub.fault("/store/", cut=1_000_000)
    path = hub_file("gpt2", "big.bin")
    assert [request.status for request in hub.asked("/store/")] == [200, 206], "resumed behind the redirect"
    assert path == tmp_path / "cache/hub/gpt2/big.bin" and path.read_bytes() == CONTENT
    assert hub_file("gpt2", "small.json").read_text() == '{"a": 1}\n'
    asked = len(hub.requests)
    assert hub_file("gpt2", "big.bin") == path and len(hub.requests) == asked


def test_hub_checks_large_files_by_sha256_and_small_ones_by_git_id(hub):
    hub.fault("/openai-community/gpt2/resolve/main/big.bin", headers={"X-Linked-Etag": f'"{"0" * 64}"'})
    hub.fault("/openai-community/gpt2/resolve/main/small.json", headers={"ETag": f'W/"{"0" * 40}"'})
    for name, digits in (("big.bin", 64), ("small.json", 40)):
        with pytest.raises(UserError, match=f"checksum is not 0{{{digits}}};"):
            hub_file("gpt2", name)
    assert {path.name for path in download.cache_dir().rglob("*") if path.is_file()} == {".lock"}
    hub_file("gpt2", "big.bin")
    hub_file("gpt2", "small.json")


def test_hub_find(hub, monkeypatch):
    assert hub_find("gpt2", ["model.safetensors", "x.json"]) is None
    path = hub_find("gpt2", ["model.safetensors", "big.bin", "small.json"])
    assert path.name == "big.bin"
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    assert hub_find("gpt2", ["model.safetensors", "big.bin"]) == path, "found in the cache without a network"


@pytest.mark.parametrize(
    ("repo", "folder"),
    [
        ("gpt2", "models--openai-community--gpt2"),
        ("gpt2", "models--gpt2"),
        ("org/name", "models--org--name"),
        ("datasets/org/set", "datasets--org--set"),
    ],
)
@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "HOME"])
def test_cache_of_the_hubs_own_client_comes_before_the_network(hub, tmp_path, monkeypatch, repo, folder, variable):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "theirs"))
    below = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "HOME": ".cache/huggingface/hub"}[variable]
    root = tmp_path / "theirs" / below / folder
    for commit in ("old", "new"):
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "snapshots" / commit / "big.bin").write_text(commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("new")
    assert hub_find(repo, ["other.bin", "big.bin"]).read_text() == "new" == hub_file(repo, "big.bin").read_text()
    assert not hub.requests
    if repo != "org/name":
        assert hub_file(repo, "small.json").read_text() == '{"a": 1}\n', "what the client has not fetched is downloaded"


def test_hub_says_what_is_missing(hub):
    with pytest.raises(NotFound, match=r"gpt2/resolve/main/none\.json: no such file"):
        hub_file("gpt2", "none.json")
    with pytest.raises(UserError, match="status 401; check the name, or, if the file is gated or private, set HF_TOKEN"):
        hub_file("someone/else", "config.json")
    for repo, name in [("gpt2", "../../x"), ("..", "x"), ("gpt2", "/etc/passwd")]:
        with pytest.raises(UserError, match="not the name of a file"):
            hub_file(repo, name)


def test_token_goes_to_the_hub_only(hub, dest, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub_file("gpt2", "big.bin")
    sent = {request.path.split("/")[1]: request.headers.get("Authorization") for request in hub.requests}
    assert sent == {"gpt2": "Bearer hf_secret", "openai-community": "Bearer hf_secret", "store": None}
    fetch(hub.store + "/files/gpt2/small.json", dest)
    assert "Authorization" not in hub.requests[-1].headers
    hub.fault("resolve", status=403)
    with pytest.raises(UserError) as error:
        hub_file("gpt2", "empty.txt")
    assert "hf_secret" not in str(error.value) + "".join(capsys.readouterr())


def test_signed_address_is_not_shown(hub):
    for fault in ({"status": 403}, {"status": 503, "times": 3}, {"hang_up": True, "times": 3}):
        hub.fault("/store/", **fault)
        with pytest.raises(UserError) as error:
            hub_file("gpt2", "big.bin")
        assert "signature" not in str(error.value) and hub.url in str(error.value)

"""Downloads against a local server: resumed, checked, whole or absent, and one plain line for what goes wrong."""

import contextlib
import errno
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
    with serving({"gpt2": folder}, monkeypatch) as hub:
        hub.folder = folder
        yield hub


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "down" / "big.bin"


def plain(hub, name="big.bin"):
    return f"{hub.url}/files/gpt2/{name}"


def left(dest):
    return sorted(path.name for path in dest.parent.iterdir())


def cut_once(hub, dest, monkeypatch, after=1_000_000, path="files"):
    """A fetch that dies after so many bytes; leaves the partial file."""
    hub.fault(path, cut=after)
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(UserError, match=r"cut after .* of 1,500,000 bytes; the same command goes on") as error:
        fetch(plain(hub), dest)
    monkeypatch.setattr(download, "TRIES", 3)
    assert not dest.exists()
    have = (dest.parent / "big.bin.partial").stat().st_size
    assert f"after {have:,} of" in str(error.value) and after - download.CHUNK <= have <= after
    return have


def test_plain(hub, dest):
    assert fetch(plain(hub), dest, sha256=SHA.upper(), size=len(CONTENT)) == dest
    assert dest.read_bytes() == CONTENT and left(dest) == ["big.bin"]
    asked = len(hub.requests)
    assert fetch(plain(hub), dest) == dest and fetch(plain(hub), dest, sha256=SHA) == dest
    assert len(hub.requests) == asked, "what is there needs no request"


def test_file_of_other_content_is_replaced_when_a_checksum_is_asked_for(hub, dest):
    dest.parent.mkdir()
    dest.write_bytes(b"old")
    fetch(plain(hub), dest)
    assert dest.read_bytes() == b"old"
    fetch(plain(hub), dest, sha256=SHA)
    assert dest.read_bytes() == CONTENT


def test_empty_file(hub, dest):
    fetch(plain(hub, "empty.txt"), dest)
    assert dest.read_bytes() == b"" and left(dest) == ["big.bin"]


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
    last = hub.requests[-1]
    assert last.status == 206 and last.headers["Range"] == f"bytes={have - 1}-"


def test_partial_file_that_is_whole(hub, dest, monkeypatch):
    cut_once(hub, dest, monkeypatch)
    (dest.parent / "big.bin.partial").write_bytes(CONTENT)
    fetch(plain(hub), dest, sha256=SHA)
    assert hub.requests[-1].headers["Range"] == f"bytes={len(CONTENT) - 1}-"


def test_changed_file_starts_over(hub, dest, monkeypatch):
    cut_once(hub, dest, monkeypatch)
    changed = CONTENT[::-1]
    (hub.folder / "big.bin").write_bytes(changed)
    fetch(plain(hub), dest)
    assert hub.requests[-1].status == 200 and dest.read_bytes() == changed


@pytest.mark.parametrize("fault", [{"headers": {"ETag": '"other"'}}, {"headers": {"Content-Range": "bytes 5-9/10"}}])
def test_wrong_range_starts_over(hub, dest, monkeypatch, fault):
    cut_once(hub, dest, monkeypatch)
    hub.heeds_if_range = False
    hub.fault("files", **fault)
    fetch(plain(hub), dest, sha256=SHA)
    assert [request.status for request in hub.requests[1:]] == [206, 200]


def test_without_etag_starts_over(hub, dest, monkeypatch):
    hub.with_etag = False
    hub.fault("files", cut=1_000_000)
    fetch(plain(hub), dest, sha256=SHA)
    assert [request.status for request in hub.requests] == [200, 200]
    assert not any("Range" in request.headers for request in hub.requests)


def test_weak_etag_starts_over(hub, dest):
    hub.fault("files", cut=1_000_000, headers={"ETag": 'W/"weak"'})
    fetch(plain(hub), dest, sha256=SHA)
    assert len(hub.requests) == 2 and not any("Range" in request.headers for request in hub.requests)


def test_many_cuts_that_each_bring_something(hub, dest, monkeypatch):
    monkeypatch.setattr(download, "PROGRESS", 100_000)
    hub.fault("files", cut=200_000, times=20)
    fetch(plain(hub), dest, sha256=SHA)
    assert len(hub.requests) > 6


def test_cuts_without_progress_end(hub, dest):
    hub.fault("files", cut=1, times=-1)
    with pytest.raises(UserError, match=r"connection cut after [01] of 1,500,000 bytes"):
        fetch(plain(hub), dest)
    assert len(hub.requests) == 3


def test_cut_without_etag_says_start_again(hub, dest):
    hub.with_etag = False
    hub.fault("files", cut=1_000_000, times=-1)
    with pytest.raises(UserError, match="bytes; start the same command again"):
        fetch(plain(hub), dest)


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"hang_up": True}])
def test_busy_server_is_asked_again(hub, dest, fault):
    hub.fault("files", times=2, **fault)
    fetch(plain(hub), dest, sha256=SHA)
    assert len(hub.requests) == 3


def test_retry_after(hub, dest, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    hub.fault("files", status=429, headers={"Retry-After": "7"})
    fetch(plain(hub), dest)
    assert waits == [7]


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"status": 503}, "status 503; try again later"),
        ({"status": 404}, "no such file there .404."),
        ({"status": 403}, "access refused .403.: gated, private"),
        ({"status": 401}, "set HF_TOKEN"),
        ({"status": 410}, "answers with status 410"),
        ({"hang_up": True}, "cuts the connection before its answer"),
        ({"sleep": 1.0}, "no answer from localhost:.* in time"),
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


def test_nobody_there(hub, dest, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    with pytest.raises(UserError, match=f"127.0.0.1:{port} refuses the connection; .* put the file at .*big.bin"):
        fetch(f"http://127.0.0.1:{port}/x", dest)
    with pytest.raises(UserError, match=r"no such host as nowhere\.invalid"):
        fetch("http://nowhere.invalid/x", dest)
    with pytest.raises(UserError, match="not an address to download from"):
        fetch("nowhere/x", dest)
    assert left(dest) == [] and not waits


def test_network_that_goes_away_keeps_what_came(hub, dest, monkeypatch):
    hub.fault("files", cut=1_000_000)
    waits = []
    monkeypatch.setattr(download.time, "sleep", lambda wait: (waits.append(wait), hub.server.server_close()))
    with pytest.raises(UserError, match=r"cut after [\d,]+ of 1,500,000 bytes; the same command goes on from there"):
        fetch(plain(hub), dest)
    assert left(dest) == ["big.bin.partial", "big.bin.partial.etag"]
    assert waits == [0.001, 0.002], "the network may come back"


@pytest.mark.parametrize("asked", [{"sha256": "0" * 64}, {"size": 7}])
def test_wrong_content_is_deleted(hub, dest, asked):
    with pytest.raises(UserError, match=r"SHA-256 is .* not 0000|1,500,000 bytes, not 7"):
        fetch(plain(hub), dest, **asked)
    assert left(dest) == []


def test_folder_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="NANOPREF_CACHE"):
        fetch(plain(hub), tmp_path / "file" / "big.bin")


def test_full_disk_is_an_oserror_that_names_the_file(hub, dest):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # the nearest to a full disk that needs no rights
    try:
        with pytest.raises(OSError) as error:
            fetch(plain(hub), dest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and error.value.filename == str(dest) + ".partial"
    assert not dest.exists()
    fetch(plain(hub), dest, sha256=SHA)
    assert hub.requests[-1].status == 206


def test_threads_fetch_one_file_once(hub, dest):
    hub.fault("files", sleep=0.1, times=-1)
    threads = [threading.Thread(target=fetch, args=(plain(hub), dest)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dest.read_bytes() == CONTENT and left(dest) == ["big.bin"] and len(hub.requests) == 1


def test_who_waited_starts_afresh_when_the_first_one_fails(hub, dest):
    hub.fault("files", sleep=0.3, status=404)

    def fail():
        with contextlib.suppress(NotFound):
            fetch(plain(hub), dest)

    first = threading.Thread(target=fail)
    first.start()
    while not hub.requests:  # until it holds the lock
        time.sleep(0.01)
    fetch(plain(hub), dest, sha256=SHA)
    first.join()
    assert left(dest) == ["big.bin"] and len(hub.requests) == 2


def test_processes_fetch_one_file_once(hub, dest):
    hub.fault("files", sleep=1.0, times=-1)
    code = "import sys; from base.download import fetch; fetch(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, plain(hub), str(dest)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert dest.read_bytes() == CONTENT and left(dest) == ["big.bin"] and len(hub.requests) == 1
    assert sum("waiting for another process" in text for text in said) <= 2


def test_progress(hub, dest, capsys, monkeypatch):
    fetch(plain(hub), dest)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 6 and lines[-1].startswith("big.bin: 100% of 1.5 MB")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    dest.unlink()
    fetch(plain(hub), dest)
    live = capsys.readouterr().err
    assert live.startswith("\r") and live.endswith("\n") and live.count("\n") == 1 and "100% of 1.5 MB" in live
    fetch(plain(hub, "small.json"), dest.with_name("small.json"))
    assert capsys.readouterr().err == ""


# the hub


def test_hub_file(hub, tmp_path):
    path = hub_file("gpt2", "big.bin")
    assert path == tmp_path / "cache/hub/gpt2/big.bin" and path.read_bytes() == CONTENT
    assert hub_file("gpt2", "small.json").read_text() == '{"a": 1}\n'
    asked = len(hub.requests)
    assert hub_file("gpt2", "big.bin") == path and len(hub.requests) == asked


def test_hub_checks_large_files_by_sha256_and_small_ones_by_git_id(hub):
    hub.fault("/openai-community/gpt2/resolve/main/big.bin", headers={"X-Linked-Etag": f'"{"0" * 64}"'})
    with pytest.raises(UserError, match=f"SHA-256 is {SHA}, not 0000"):
        hub_file("gpt2", "big.bin")
    hub.fault("/openai-community/gpt2/resolve/main/small.json", headers={"ETag": f'W/"{"0" * 40}"'})
    with pytest.raises(UserError, match=r"git SHA-1 is .*, not 0000"):
        hub_file("gpt2", "small.json")
    hub.fault("/openai-community/gpt2/resolve/main/big.bin", headers={"X-Linked-Size": "7"})
    with pytest.raises(UserError, match="1,500,000 bytes came where 7 are expected"):
        hub_file("gpt2", "big.bin")
    assert not list(download.cache_dir().rglob("*.*"))
    hub_file("gpt2", "big.bin")
    hub_file("gpt2", "small.json")


def test_hub_resumes_behind_the_redirect(hub):
    hub.fault("/store/", cut=1_000_000)
    assert hub_file("gpt2", "big.bin").read_bytes() == CONTENT
    assert [request.status for request in hub.asked("/store/")] == [200, 206]


def test_hub_find(hub, monkeypatch):
    assert hub_find("gpt2", ["model.safetensors", "x.json"]) is None
    path = hub_find("gpt2", ["model.safetensors", "big.bin", "small.json"])
    assert path.name == "big.bin"
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    assert hub_find("gpt2", ["model.safetensors", "big.bin"]) == path, "found in the cache without a network"


def test_hub_says_what_is_missing(hub):
    with pytest.raises(NotFound, match=r"gpt2/resolve/main/none\.json: no such file"):
        hub_file("gpt2", "none.json")
    with pytest.raises(UserError, match="gated, private, or not there at all"):
        hub_file("someone/else", "config.json")
    for repo, name in [("gpt2", "../../x"), ("..", "x"), ("gpt2", "/etc/passwd")]:
        with pytest.raises(UserError, match="not the name of a file"):
            hub_file(repo, name)


def test_token_goes_to_the_hub_only(hub, dest, monkeypatch, capsys, tmp_path):
    (tmp_path / "netrc").write_text("machine localhost login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub_file("gpt2", "big.bin")
    sent = {request.path.split("/")[1]: request.headers.get("Authorization") for request in hub.requests}
    assert sent == {"gpt2": "Bearer hf_secret", "openai-community": "Bearer hf_secret", "store": None}
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    fetch(plain(hub), dest)
    assert "Authorization" not in hub.requests[-1].headers
    fetch(hub.store + "/files/gpt2/small.json", dest.with_name("small"), hub=True)
    assert "Authorization" not in hub.requests[-1].headers
    hub.fault("resolve", status=403)
    with pytest.raises(UserError) as error:
        hub_file("gpt2", "empty.txt")
    assert "hf_secret" not in str(error.value) + "".join(capsys.readouterr())


def test_signed_address_is_not_shown(hub):
    hub.fault("/store/", status=403)
    with pytest.raises(UserError) as error:
        hub_file("gpt2", "big.bin")
    assert "signature" not in str(error.value)

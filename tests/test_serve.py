"""sample.py --server and the judge against a real server, `transformers serve`. NANOPREF_SMOLLM2 names SmolLM2's folder."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests

from tests.conftest import flags, free_port

FOLDER = os.environ.get("NANOPREF_SMOLLM2", "")
SERVES = all(map(find_spec, ("transformers", "fastapi", "uvicorn", "openai")))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="NANOPREF_SMOLLM2 names no folder of SmolLM2"),
    pytest.mark.skipif(not SERVES, reason="transformers serve needs pip install 'transformers[serving]'"),
]
PROMPTS = [
    {"prompt": "The capital of France is"},
    {"prompt": "Once upon a time, there was a", "chosen": " king."},
    {"messages": [{"role": "user", "content": "Name a colour."}]},
    {"messages": [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who are you?"}]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The model with a generation_config.json that says to draw: without it this server takes the likeliest token always."""
    folder = tmp_path_factory.mktemp("serve") / "smollm2"
    folder.mkdir()
    for path in Path(FOLDER).iterdir():
        (folder / path.name).symlink_to(path.resolve())
    drawn = json.loads((folder / "generation_config.json").read_text()) | {"do_sample": True}
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(drawn))
    return folder


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """The address of the server, which runs as long as this file's tests."""
    port, log = free_port(), tmp_path_factory.mktemp("log") / "serve.log"
    command = [Path(sys.executable).with_name("transformers"), "serve", "--device", "cpu", "--dtype", "float32"]
    with open(log, "w") as said:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), model],
            stdout=said,
            stderr=said,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def drawn(call, folder: Path, **keys) -> list[list[str]]:
    """The completions of PROMPTS by sample.py."""
    asked, out = folder / "prompts.jsonl", folder / "out.jsonl"
    asked.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    status, _, err = call("sample", *flags(prompts=asked, out=out, max_new_tokens=12, **keys))
    assert status == 0, err
    return [json.loads(line)["completions"] for line in out.read_text().splitlines()]


def test_greedy_completions_are_those_of_the_model_here(url, model, call, tmp_path):
    """Texts and conversations, with a stop text that this server leaves in its answers."""
    for stop in ("", " a"):
        served = drawn(call, tmp_path, server=url, server_model=model, temperature=0, stop=stop or None)
        here = drawn(call, tmp_path, model=FOLDER, dtype="float32", temperature=0, stop=stop or None)
        assert served == here and all(text for texts in served[:2] for text in texts)


def test_samples_of_a_server_that_gives_one_text_at_a_time(url, model, call, tmp_path):
    keys = {"server": url, "server_model": model, "n": 3, "workers": 2, "stop": "\n"}
    texts = drawn(call, tmp_path, **keys)
    assert [len(t) for t in texts] == [3] * 4 and sum(len(set(t)) for t in texts) > 6
    assert not any("\n" in text for t in texts for text in t)


def test_what_the_server_refuses_ends_in_one_line(url, model, refused, tmp_path):
    asked = tmp_path / "prompts.jsonl"
    asked.write_text(json.dumps(PROMPTS[0]) + "\n")
    keys = {"server": url, "prompts": asked, "out": tmp_path / "out"}
    refused("sample", *flags(**keys, server_model="no/such"), says="prompts.jsonl:1: http://127.0.0.1")
    line = refused("sample", *flags(**keys, server_model=model, top_k=5), says="Unexpected fields in the request: {'top_k'}")
    assert "leave out --top_k" in line and not (tmp_path / "out").exists()


def test_a_judge_behind_it(url, model, call, tmp_path):
    """It answers every question; whether a verdict is in the answer is up to the model."""
    answers = tmp_path / "answers.jsonl"
    record = PROMPTS[0] | {"completions": [" Paris."], "chosen": " I do not know, and I do not care."}
    answers.write_text(json.dumps(record) + "\n")
    keys = {"responses": answers, "judge": url, "judge_model": model, "out": tmp_path / "win.json"}
    status, _, err = call("eval_winrate", *flags(**keys, max_tokens=16, asks=2, details=tmp_path / "details.jsonl"))
    details = json.loads((tmp_path / "details.jsonl").read_text())
    assert status in (0, 2) and details["replies"][0][0], err
    cache = [json.loads(line) for line in (tmp_path / "win.cache.jsonl").read_text().splitlines()]
    assert cache and all(reply["tokens_in"] > 100 and 0 < reply["tokens_out"] <= 16 for reply in cache)

"""A validation split of one's own file, by a hash of the prompt."""

import json
from pathlib import Path

import pytest

from data import cache, load
from data.encode import data_hash, load_encoded
from data.tokenizer import get
from tests.conftest import SCRATCH, flags, metrics


@pytest.fixture
def answers(tmp_path) -> Path:
    """200 prompts, each in two lines that are far apart: as text, and as conversations of several turns."""
    lines, chats = [], []
    for n in [*range(200), *range(200)]:
        prompt, turn = f"How much is {n} and 1?", [{"role": "user", "content": f"How much is {n} and 1?"}]
        answer = f" {len(lines)}"
        lines.append({"prompt": prompt, "completion": answer, "chosen": answer, "rejected": " no"})
        said = [{"role": "assistant", "content": answer}]
        chats.append({"messages": [*turn, *said, {"role": "user", "content": f"{len(lines)}?"}, *said]})
    for name, rows in (("text", lines), ("chat", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def halves(path: Path, view: str, **more) -> list[list[str]]:
    """The questions in the training half and in the other one, of which that has a tenth."""
    found = []
    for name in ("train", "val"):
        examples = load(str(path), "train", view, half=(name, 0.1), **more)
        found.append([e.prompt or e.completions[0][0]["content"] for e in examples])
    return found


def test_a_share_of_the_prompts_for_validation(answers):
    """No prompt is in both halves, and all are in one; sft and preference data are split alike, and so is part of a file."""
    train, val = halves(answers / "text.jsonl", "sft")
    assert len(train) + len(val) == 400 and not {*train} & {*val} and 10 < len({*val}) < 35
    assert all(prompts.count(prompt) == 2 for prompts in (train, val) for prompt in prompts)
    assert halves(answers / "text.jsonl", "preference") == [train, val]
    chats = halves(answers / "chat.jsonl", "sft")
    assert len(chats[0]) + len(chats[1]) == 400 and not {*chats[0]} & {*chats[1]} and 10 < len({*chats[1]}) < 35
    limited = halves(answers / "text.jsonl", "sft", limit=5)
    assert limited == [train[:5], val[:5]]


def test_the_prompts_kept_back_as_a_file(answers, call):
    out = answers / "held_out.jsonl"
    status, _, err = call("data.__main__", *flags(data=answers / "text.jsonl", val_share=0.1, view="sft", out=out))
    assert status == 0, err
    kept = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert kept == halves(answers / "text.jsonl", "sft")[1]


def test_a_share_of_a_large_file(answers, monkeypatch):
    """The halves' tokens are kept apart."""
    args = (str(answers / "text.jsonl"), "train", "sft", get("gpt2"), 64, "drop")
    want = {name: data_hash(load_encoded(*args, half=(name, 0.1))) for name in ("train", "val")}
    monkeypatch.setattr(cache, "SMALL", 1)
    monkeypatch.setenv("NANOPREF_CACHE", str(answers / "cache"))
    for _ in range(2):
        assert {name: data_hash(load_encoded(*args, half=(name, 0.1))) for name in ("train", "val")} == want
    assert len({*want.values()}) == 2


@pytest.mark.slow
def test_val_share_in_the_stages(files, call, refused, tmp_path):
    """The reference file is bound to both halves; a resumed run keeps its own."""
    model = {**SCRATCH, "data": files["sft"], "val_share": 0.3, "samples": 0}
    status, out, err = call("sft", *flags(**model, out_dir=tmp_path / "sft", max_steps=2))
    assert status == 0, err
    assert "val data" in out and {r["split"] for r in metrics(tmp_path / "sft")} == {"train", "val"}
    keys = {"init_from": tmp_path / "sft", "data": files["pairs"]}
    ref = tmp_path / "ref.safetensors"
    assert call("precompute_ref", *flags(**keys, val_share=0.3, out=ref))[0] == 0
    dpo = {**keys, "ref": ref, "max_steps": 2, "samples": 0}
    status, _, err = call("dpo", *flags(**dpo, val_share=0.3, out_dir=tmp_path / "dpo"))
    assert status == 0, err
    refused("dpo", *flags(**dpo, val_share=0.2, out_dir=tmp_path / "dpo2"), says="was made with another data")
    refused("dpo", *flags(**dpo, val_share=0.2, out_dir=tmp_path / "dpo"), says="made with another data")
    keys = {"model": tmp_path / "dpo", "data": files["pairs"], "ref": ref, "out": tmp_path / "r.json"}
    status, _, err = call("eval_reward", *flags(**keys, val_share=0.3, limit=1000))
    assert status == 0, err
    assert 0 < json.loads((tmp_path / "r.json").read_text())["n"] < 48
    bad = {**model, "out_dir": tmp_path / "bad"}
    for more, says in (
        ({"val_data": files["sft"]}, "key val_share: 0.3, but val_data names validation data already"),
        ({"val_split": "x"}, "key val_share: 0.3, but val_split names"),
        ({"data": "toy"}, "key val_share: 0.3: the recipe toy has the splits train, val, test"),
        ({"val_share": 1e-9}, "key val_share: 1e-09 leaves no prompt of"),
        ({"val_share": 1.0}, "key val_share: 1.0 must be below 1"),
    ):
        refused("sft", *flags(**{**bad, **more}), says=says)
    assert not (tmp_path / "bad").exists()

"""A judge without a server: its shares are the model's own probabilities of the verdicts, in both orders."""

import json

import pytest
import torch

import weights
from data.tokenizer import get
from judge.verdict import fill
from model import GPTConfig
from tests.conftest import ROOT, flags

PAIRS = [("Say hello.", "Hello!", "Go away."), ("What is 2+2?", "4", "It is five, I think."), ("Sing.", "La la.", "No.")]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A small random model with clear preferences."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=320, vocab_size=get("gpt2").size)
    drawn = ((n, 20 * p if n == "wte.weight" else p) for n, p in weights.empty(config).initial_weights(0))
    weights.save_tensors(config, drawn, get("gpt2"), folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def logps(judge, question: str, asked: str, verdicts: list[list[int]]) -> torch.Tensor:
    """log p of each verdict's tokens, each a plain sequence of its own."""
    model, tokenizer = weights.load(judge), get("gpt2")
    prompt, found = tokenizer.encode(f"{question}\n\n{asked}"), []
    for ids in verdicts:
        with torch.no_grad():
            each = model.logits(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        found.append(each.gather(1, torch.tensor(ids)[:, None]).sum())
    return torch.stack(found)


def share_of_a(judge, prompt: str, a: str, b: str) -> float:
    template = (ROOT / "judge/prompts/local_pairwise.txt").read_text()
    question = fill(template, prompt=prompt, response_a=a, response_b=b)
    names = [get("gpt2").encode(name) for name in (" A", " B")]
    return logps(judge, question, "Verdict:", names).softmax(0)[0].item()


def test_shares_are_the_models_in_both_orders(judge, pairs, call, tmp_path):
    keys = {"judge": "local", "judge_model": judge, "out": tmp_path / "out.json", "details": tmp_path / "d.jsonl"}
    status, said, err = call("eval_winrate", *flags(calibrate=pairs, **keys))
    assert status == 0 and "6 questions to" in said and "soft" in said, err
    found = json.loads((tmp_path / "out.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    soft = []
    for row, (prompt, chosen, rejected) in zip(rows, PAIRS, strict=True):
        first, second = share_of_a(judge, prompt, chosen, rejected), share_of_a(judge, prompt, rejected, chosen)
        soft.append((first + 1 - second) / 2)
        assert row["share"] == pytest.approx(soft[-1], abs=1e-4)
        verdicts = ["A" if p > 0.5 else "B" for p in (first, second)]
        assert row["verdicts"] == verdicts
        assert row["outcome"] == {"AB": "win", "BA": "loss"}.get("".join(verdicts), "tie"), "a disagreement is a tie"
    assert found["soft_win_rate"] == pytest.approx(sum(soft) / 3, abs=1e-4)
    assert found["both_orders"] and "temperature" not in found and (found["n"], found["failed"]) == (3, 0)
    again = call("eval_winrate", *flags(calibrate=pairs, **keys))
    assert again[0] == 0 and json.loads((tmp_path / "out.json").read_text()) == found, "the same every time"


@pytest.mark.slow
def test_a_score_is_the_expected_number(judge, call, tmp_path):
    record = {"prompt": "Say hello.", "completions": ["Hi."], "output": "Hello!"}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    keys = {"judge": "local", "judge_model": judge, "mode": "score", "out": tmp_path / "out.json"}
    status, _, err = call("eval_winrate", *flags(responses=tmp_path / "r.jsonl", **keys))
    assert status == 0, err
    template, tokenizer = (ROOT / "judge/prompts/judge_score.txt").read_text(), get("gpt2")
    question = fill(template, prompt="Say hello.", reference="Hello!", response="Hi.")
    numbers = [[*tokenizer.encode(f" {n}"), tokenizer.eot] for n in range(101)]  # ended: 8 is not the beginning of 85
    p = logps(judge, question, "Score:", numbers).softmax(0)
    assert json.loads((tmp_path / "out.json").read_text())["mean"] == pytest.approx(
        (p @ torch.arange(101.0).double()).item(), abs=1e-3
    )


def test_a_dry_run_asks_nothing(judge, pairs, call, tmp_path):
    keys = {"judge": "local", "judge_model": judge, "out": tmp_path / "out.json", "dry_run": "true"}
    status, said, _ = call("eval_winrate", *flags(calibrate=pairs, **keys))
    assert status == 0 and "6 questions to" in said and "win rate" not in said and not (tmp_path / "out.json").exists()


def test_a_question_that_is_too_long_has_failed(judge, call, tmp_path):
    record = {"prompt": "word " * 400, "chosen": "a", "rejected": "b"}
    (tmp_path / "long.jsonl").write_text(json.dumps(record) + "\n")
    keys = {"judge": "local", "judge_model": judge, "out": tmp_path / "out.json"}
    status, _, err = call("eval_winrate", *flags(calibrate=tmp_path / "long.jsonl", **keys))
    assert status == 2 and "error: key judge: no verdict at all: 1 failed of 1" in err and "1 of 1 judgements failed" in err


def test_what_a_user_can_do_wrong(judge, pairs, refused, tmp_path, monkeypatch):
    keys = {"judge": "local", "judge_model": judge, "out": tmp_path / "out.json"}
    refused("eval_winrate", *flags(**keys), says="give either --responses, a model's answers, or --calibrate")
    refused("eval_winrate", *flags(**keys, calibrate=pairs, responses=pairs), says="give either --responses")
    refused("eval_winrate", *flags(**keys, calibrate=pairs, mode="score"), says="key calibrate: preferences are pairs")
    refused("eval_winrate", *flags(**keys | {"judge_model": tmp_path / "no"}, calibrate=pairs), says="is no folder")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("eval_winrate", *flags(**keys, calibrate=pairs), says="local runs in one process")

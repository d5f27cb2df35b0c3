"""eval_reward.py on prompts: reward, KL and the limit against exact sums over all completions that there are."""

import itertools
import json
import math

import pytest
import torch

import weights
from base.errors import UserError
from data import reviews, rewards
from data.tokenizer import get
from model import GPTConfig
from tests.conftest import flags

NEW = 2  # tokens of a completion: the vocabulary has 45, so there are 1 + 44 * 45 completions
PROMPTS = [" the cast was", " the plot was", " the music"]
REWARD = "def rate(prompt, completion):\n    return (len(prompt) * len(completion)) % 7 / 7\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two models that have clear preferences, prompts and a reward."""
    folder = tmp_path_factory.mktemp("frontier")
    tokenizer = get("reviews")
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=tokenizer.size)
    for seed, name in enumerate(("policy", "reference")):
        drawn = ((n, 12 * p if n == "wte.weight" else p) for n, p in weights.empty(config).initial_weights(seed))
        weights.save_tensors(config, drawn, tokenizer, folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (folder / "reward.py").write_text(REWARD)
    return folder


def keys(work, out, **more) -> list[str]:
    named = {"model": work / "policy", "ref_model": work / "reference", "prompts": work / "prompts.jsonl"}
    return flags(**named | {"reward": f"{work / 'reward.py'}:rate", "max_new_tokens": NEW, "out": out} | more)


@pytest.fixture(scope="module")
def exact(work):
    """(rewards, log-probs under policy and reference) of every completion of every prompt, (prompts, completions) each."""
    tokenizer, rate = get("reviews"), rewards.get(f"{work / 'reward.py'}:rate")
    words = [i for i in range(tokenizer.size) if i != tokenizer.eot]
    completions = [(tokenizer.eot,), *itertools.product(words, range(tokenizer.size))]
    texts = [tokenizer.decode([i for i in c if i != tokenizer.eot]) for c in completions]
    found = [torch.tensor([[rate(p, text) for text in texts] for p in PROMPTS]).double()]
    for name in ("policy", "reference"):
        model, rows = weights.load(work / name), []
        for p in PROMPTS:
            prompt = tokenizer.encode(p)
            with torch.no_grad():
                first = model.logits(torch.tensor([prompt]))[0, -1].double().log_softmax(0)
                each = torch.tensor([[*prompt, w] for w in words])
                second = model.logits(each)[:, -1].double().log_softmax(1)  # (words, vocabulary)
            both = first[words, None] + second
            rows.append(torch.cat([first[[tokenizer.eot]], both.flatten()]))
        found.append(torch.stack(rows))
        torch.testing.assert_close(found[-1].exp().sum(1), torch.ones(3).double())
    return found


def test_reward_kl_and_limit_are_the_exact_ones(work, exact, call, tmp_path):
    reward, policy, reference = exact
    n = 3000
    status, said, err = call("eval_reward", *keys(work, tmp_path / "r.json", n=n, optimum=n, batch_size=500))
    assert status == 0 and ": reward " in said and ", kl " in said, err
    found = json.loads((tmp_path / "r.json").read_text())
    p = policy.exp()
    gained, kl = (p * reward).sum(1), (p * (policy - reference)).sum(1)
    assert kl.mean() > 0.3  # or the test would say nothing
    for name, values, mean in (("reward", reward, gained), ("kl", policy - reference, kl)):
        error = ((p * (values - mean[:, None]) ** 2).sum(1).mean() / n / len(PROMPTS)).sqrt().item()
        assert found[name] == pytest.approx(mean.mean().item(), abs=3 * error)
    points = [point for point in found["limit"] if point["ess"] > 100]
    assert len(points) > 10
    for point in points:
        best = (reference + reward / point["b"]).softmax(1)
        wanted = (best * reward).sum(1).mean().item(), (best * (best.log() - reference)).sum(1).mean().item()
        # the error of a mean over so many completions as the weights amount to
        assert point["reward"] == pytest.approx(wanted[0], abs=3 * reward.std().item() / math.sqrt(point["ess"]))
        assert point["kl"] == pytest.approx(wanted[1], abs=3 / math.sqrt(point["ess"]))
    kls, gains = ([point[name] for point in points] for name in ("kl", "reward"))
    assert kls == sorted(kls) and gains == sorted(gains)


@pytest.mark.slow
def test_best_of_n_is_that_of_the_order_statistics(work, exact, call, tmp_path):
    """Drawn by sample.py, and weighed by eval_reward.py: the reward is the exact one; the KL is, and is below its bound."""
    reward, _, reference = exact
    n, draws = 4, 400
    p = reference.exp()
    under, at = (
        torch.stack([(p * chosen(reward, reward[:, [i]])).sum(1) for i in range(reward.size(1))], 1)
        for chosen in (torch.lt, torch.eq)
    )
    best = p * ((under + at) ** n - under**n) / at  # of equal rewards each is as likely the first as it is likely
    gained, kl = ((best * values).sum(1).mean().item() for values in (reward, best.log() - reference))

    samples = tmp_path / "s.jsonl"
    keys_of = {
        "model": work / "reference",
        "prompts": work / "prompts.jsonl",
        "n": n * draws,
        "max_new_tokens": NEW,
        "out": samples,
    }
    assert call("sample", *flags(**keys_of, batch_size=500))[0] == 0
    rate = rewards.get(f"{work / 'reward.py'}:rate")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    drawn = torch.tensor([[rate(row["prompt"], text) for text in row["completions"]] for row in rows]).double()
    tops = drawn.view(len(PROMPTS), draws, n).amax(2)
    error = (tops.var(1).mean() / draws / len(PROMPTS)).sqrt().item()
    assert tops.mean().item() == pytest.approx(gained, abs=3 * error)

    status, _, err = call("eval_reward", *keys(work, tmp_path / "r.json", n=1, optimum=n * draws, batch_size=500))
    assert status == 0, err
    found = {entry["k"]: entry for entry in json.loads((tmp_path / "r.json").read_text())["best_of"]}
    assert found[n]["reward"] == pytest.approx(gained, abs=3 * error)
    assert found[n]["kl"] == pytest.approx(kl, rel=0.05)
    for k, entry in found.items():
        assert entry["kl"] < math.log(k) - (k - 1) / k
        assert entry["reward"] > drawn.mean().item()


def test_the_standard_error_counts_prompts(work, call, tmp_path):
    status, _, err = call("eval_reward", *keys(work, tmp_path / "r.json", n=40, details=tmp_path / "d.jsonl"))
    assert status == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    means = torch.tensor([row["rewards"] for row in rows]).double().mean(1)
    assert found["reward"] == pytest.approx(means.mean().item())
    assert found["reward_stderr"] == pytest.approx((means.std() / math.sqrt(3)).item())


def test_a_model_is_at_no_distance_from_itself(work, call, tmp_path):
    status, _, err = call("eval_reward", *keys(work, tmp_path / "r.json", model=work / "reference", n=20))
    found = json.loads((tmp_path / "r.json").read_text())
    assert status == 0 and found["kl"] == found["kl_stderr"] == 0, err


def test_reviews_and_their_reward():
    made = reviews.reviews("train", 2000)
    rated = [reviews.reward(*review) for review in made]
    assert sum(rated) / len(rated) == pytest.approx(0.5, abs=0.03)
    assert reviews.reward(" the cast was", " bold .") == pytest.approx(1 / (1 + math.exp(-reviews.WEIGHTS["bold"])))
    tokenizer = get("reviews")
    for prompt, completion in made[:100]:
        ids = tokenizer.encode(prompt + completion)
        assert tokenizer.decode(ids) == prompt + completion and len(tokenizer.encode(prompt)) == 3


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("def rate(p, c): return 1 / 0", "ZeroDivisionError"),
        ("def rate(p, c): return float('nan')", "nan is not a finite number"),
        ("def rate(p, c): return 'good'", "'good' is not a finite number"),
        ("def rate(p, c): return True", "True is not a finite number"),
        ("def rate(p, c):\n    while True: pass", "takes more than"),
        ("def rate(p): return 1", "TypeError"),
        ("rate = 5", "has no function 'rate'"),
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("def rate(p, c", "cannot be imported: SyntaxError"),
    ],
)
def test_rewards_that_are_wrong(function, says, work, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS", 1)
    lines = ["import sys, numpy", "def small(p, c): return numpy.float32(0.5)", "def leaves(p, c): sys.exit(0)"]
    (tmp_path / "r.py").write_text("\n".join([*lines, "def text(p, c): return '1'"]))
    assert rewards.get(f"{tmp_path}/r.py:small")("", "") == 0.5
    with pytest.raises(UserError, match="SystemExit"):
        rewards.get(f"{tmp_path}/r.py:leaves")("", "")
    with pytest.raises(UserError, match="'1' is not a finite number"):
        rewards.get(f"{tmp_path}/r.py:text")("", "")


def test_a_reward_file_is_not_written_over(work, refused):
    refused("eval_reward", *keys(work, work / "reward.py"), says="the run would write over")
    assert (work / "reward.py").read_text() == REWARD

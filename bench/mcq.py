"""eval_mcq.py against lm-evaluation-harness: the log-likelihood of every option of multiple-choice problems."""

import json
from pathlib import Path

import weights
from bench import common, peers
from bench.common import KEEP, Config, flops, prepare
from data import load, tokenizer
from data.encode import Encoded
from runtime import distributed

WARMUP, FEW = 8, 16  # problems before the clock runs, and problems that a setting is tried on
SETTINGS = {f"lm_eval, batch {n}": {"batch_size": n} for n in (1, 4, 16)}
SETTINGS |= {f"{name}, memory kept": setting | {"env": KEEP} for name, setting in SETTINGS.items()}


def ours_mcq(job: dict) -> dict:
    """eval_mcq.evaluate, the function behind the script, after a warm-up on the first problems."""
    import eval_mcq

    compute, tok = distributed.setup(job["device"], job["dtype"]), tokenizer.get("gpt2")
    model = weights.load(job["folder"]).to(compute.device)
    examples = load(str(job["data"]), "val", "loglik")
    cfg = eval_mcq.Config(model="", data="")
    eval_mcq.evaluate(model, tok, examples[: job["warmup"]], cfg, compute)
    start = peers.now()
    _, details, _ = eval_mcq.evaluate(model, tok, examples[job["warmup"] :], cfg, compute)
    return {"ends": [start, peers.now()], "logps": [d["logps"] for d in details]}


def harness_mcq(job: dict) -> dict:
    """lm-evaluation-harness's HFLM.loglikelihood. It tokenizes while the clock runs, as ours does."""
    lm = peers.harness(job["folder"], job["settings"]["batch_size"], job["device"], job["dtype"])
    rows = [json.loads(line) for line in job["data"].read_text().splitlines()][: job.get("limit")]
    docs = [(r["prompt"], r["choices"]) for r in rows]
    peers.harness_logps(lm, docs[: job["warmup"]])
    start = peers.now()
    logps = peers.harness_logps(lm, docs[job["warmup"] :])
    return {"ends": [start, peers.now()], "logps": logps}


def suite(cfg: Config, temp: Path) -> dict:
    """Ours against the harness: a table, accuracy and log-likelihoods side by side, and everything as a dict."""
    work = prepare(cfg, temp, cfg.init, "mcq", "mcq", cfg.pairs + WARMUP)
    items, base = work.items[WARMUP:], common.base_job(cfg, WARMUP)
    job = base | {"folder": work.folder, "data": work.data}
    theirs = common.peer_jobs(cfg, harness_mcq, job, SETTINGS)
    cost = flops(items, work.model, train=False)
    report = common.compare(cfg, work, base, "problems", cost, (ours_mcq, job), theirs, few={"limit": WARMUP + FEW})
    if peer := report.get("compared"):
        report["same_work"] = same_options(items, report["results"]["ours"][0]["logps"], report["results"][peer][0]["logps"])
    return report


def same_options(items: list[Encoded], ours: list[list[float]], theirs: list[list[float]]) -> dict:
    """Print and return accuracy on both sides, and the largest difference between log-likelihoods of an option."""
    gap = max(abs(x - y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True))
    accuracy = {
        side: sum(scores.index(max(scores)) == item.label for scores, item in zip(found, items, strict=True)) / len(items)
        for side, found in (("ours", ours), ("theirs", theirs))
    }
    print(f"accuracy {accuracy['ours']:.4f} and {accuracy['theirs']:.4f}; log-likelihoods differ by at most {gap:.1e}")
    return {"largest": gap, "accuracy": accuracy}

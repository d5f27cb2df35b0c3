"""The suite rows: four completions of a prompt and the six pairs among them, by dpo.py in one row, by dpo.py as six lines of
chosen and rejected, and as these by TRL's DPOTrainer."""

import dataclasses
import json
from pathlib import Path

from bench import common
from bench.common import Config, flops, prepare
from bench.training import our_job, same_steps, trl_jobs

APART = "ours, each pair apart"


def apart(line: str) -> str:
    """A line of several completions as a line a pair."""
    record = json.loads(line)
    prompt, texts = record["prompt"], record["completions"]
    pairs = [{"prompt": prompt, "chosen": texts[w], "rejected": texts[l]} for w, l in record["pairs"]]
    return "".join(json.dumps(pair) + "\n" for pair in pairs)


def suite(cfg: Config, temp: Path) -> dict:
    """Ours in rows, ours apart and TRL's trainer: a table, the losses side by side, and everything as a dict."""
    work = prepare(cfg, temp, cfg.init, "rows", "dpo", (cfg.pairs + cfg.batch_size) // len(common.ALL_PAIRS))
    file = temp / "apart.jsonl"
    file.write_text("".join(map(apart, work.data.read_text().splitlines())))
    alone, base = dataclasses.replace(work, data=file), common.base_job(cfg, warmup=1)
    ours, ours_apart = (our_job(cfg, of, temp, "dpo", base, {}) for of in (work, alone))
    theirs = trl_jobs(cfg, alone, temp, "dpo", base)
    results, tried = common.race(cfg, ours, theirs, few={"max_steps": 3}, also={APART: ours_apart})
    items = work.items[cfg.batch_size // len(common.ALL_PAIRS) :]
    floor, tokens = flops(items, work.model, train=True) / base["matmul"]["flops_per_s"], sum(i.row_tokens for i in items)
    print(
        f"\nrows: {cfg.init}, {cfg.pairs} pairs of {len(items)} prompts after a warm-up of {cfg.batch_size}, batch "
        f"{cfg.batch_size}, {base['matmul']['said']}; {work.source}; tokens are those of the rows"
    )
    common.head("pairs")
    rows = [common.row(name, found, cfg.pairs, tokens, floor) for name, found in results.items()]
    against = {other["name"]: common.ratios(rows[0], other) for other in rows[1:]}
    same = {n: same_steps(results["ours"][0]["records"], found[0]["records"]) for n, found in results.items() if n != "ours"}
    return {"rows": rows, "against": against, "same_work": same, "tried": tried, "results": results, "data": work.source}

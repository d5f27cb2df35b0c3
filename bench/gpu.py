"""How fast on a GPU: every size, kind of data and setting of sft.py and dpo.py until the time is up.

Needs nothing but torch. It runs on a CPU too, which proves that the suite works, and says nothing about a GPU.
"""

import time
from importlib.util import find_spec
from pathlib import Path

from bench import common
from bench.common import Config, flops, prepare
from bench.training import our_job, trl_jobs

WARMUP = 3  # steps: compiled forwards settle after a few shapes
SETTINGS = {  # of this project's scripts
    "plain": {},
    "compiled": {"compile": "true"},
    "packed": {"row_len": 4096},
    "activation checkpointing": {"activation_checkpointing": "true"},
}
TRL = ("TRL, defaults", "TRL, no checkpointing")


def suite(cfg: Config, temp: Path) -> dict:
    """A row a case, with its share of the matrix product's rate (MFU)."""
    end = time.monotonic() + 60 * cfg.minutes
    base = common.base_job(cfg, WARMUP)
    rate = base["matmul"]
    print(f"{rate['said']}: matrix product {rate['flops_per_s'] / 1e12:.2f} TFLOP/s in {rate['dtype']}")
    if cfg.device == "cpu":
        print("on a CPU: proves that the suite runs, says nothing about a GPU")
    ours, peer = list(SETTINGS), TRL if cfg.peer != "none" and find_spec("trl") else ()
    cases = [  # the most telling first: plain for every size, then the peer, then the settings
        (f"{stage} {kind} {model} {name}", stage, kind, model, name)
        for kind in ("hh", "hellaswag")
        for names in (ours[:1], peer, ours[1:])
        for model in cfg.models.split(",")
        for stage in ("dpo", "sft")
        for name in names
    ]
    common.head("pairs")
    report: dict = {"matmul": rate, "rows": [], "left_out": []}
    for label, stage, kind, model, name in cases:
        if time.monotonic() > end:
            report["left_out"].append(label)
            print(f"left out: {label}: the {cfg.minutes:g} minutes were up")
            continue
        work = prepare(cfg, temp, model, kind, stage, cfg.pairs + WARMUP * cfg.batch_size)
        if name in SETTINGS:
            job = our_job(cfg, work, temp, stage, base, SETTINGS[name])
        else:
            job = trl_jobs(cfg, work, temp, stage, base)[name]
        result = common.attempt(*job)
        if "error" in result:
            print(f"{label:46}failed: {result['error'][:100]}", flush=True)
            report["rows"].append({"name": label, "error": result["error"]})
            continue
        items = work.items[-cfg.pairs :]
        floor = flops(items, work.model, train=True) / rate["flops_per_s"]
        row = common.row(label, [result], len(items), sum(i.row_tokens for i in items), floor)
        losses = [r["loss"] for r in result["records"]]
        report["rows"].append(row | {"mfu": 1 / row["floors"], "step_s": row["seconds"] / result["steps"], "losses": losses})
    print("x floor: the time, over that of the useful operations (a prompt once) at the matrix product's rate; 1 / MFU")
    return report

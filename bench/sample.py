"""sample.py against transformers' `generate`: greedy, the same prompts, as many new tokens, one prompt at once and 16."""

import time
from pathlib import Path

import numpy as np
import torch

import weights
from bench import common, peers
from bench.common import KEEP, Config, flops, matrices, prepare
from data.encode import Encoded
from generate import lay_out, stream
from runtime import distributed

NEW_TOKENS = 64  # of a completion
SETTINGS = {
    "transformers, defaults": {},
    "transformers, longest prompts first": {"by_length": True},
    "transformers, eager attention": {"attn_implementation": "eager", "by_length": True},
    "transformers, memory kept": {"by_length": True, "env": KEEP},
}


def ours_sample(job: dict) -> dict:
    """generate.stream, what sample.py runs, greedy, after a few tokens of a prompt; "again": after the same work."""
    compute = distributed.setup(job["device"], job["dtype"])
    model = weights.load(job["folder"]).to(compute.device)
    prompts = dict(enumerate(job["prompts"]))
    if compute.device.type == "cpu" and compute.dtype == torch.float32:
        lay_out(model, job["batch_size"])
    with compute.autocast(), torch.inference_mode():
        first = {"batch_size": job["batch_size"]} if job.get("again") else {}
        list(stream(model, prompts if first else {0: prompts[0]}, job["new"] if first else 4, -1, **first))
        synchronize(job)
        start = peers.now()
        found = {i: ids for i, _, ids in stream(model, prompts, job["new"], -1, batch_size=job["batch_size"])}
    return {"ends": [start, peers.now()], "tokens": [found[i] for i in prompts]}


def transformers_sample(job: dict) -> dict:
    """transformers' generate on the same prompts, greedy, with as many new tokens."""
    settings = dict(job["settings"])
    by_length, static = settings.pop("by_length", False), settings.pop("cache_implementation", None)
    model = peers.generator(job["folder"], job["device"], job["dtype"], **settings)
    model.generation_config.cache_implementation = static
    with peers.quiet():
        if job.get("again"):
            peers.generate(model, job["prompts"], job["new"], job["batch_size"], by_length)
        else:
            peers.generate(model, job["prompts"][:1], 4, 1)
        synchronize(job)
        start = peers.now()
        found = peers.generate(model, job["prompts"], job["new"], job["batch_size"], by_length)
    return {"ends": [start, peers.now()], "tokens": found}


def synchronize(job: dict) -> None:
    if job["device"] != "cpu":
        torch.cuda.synchronize()


def reading(job: dict) -> dict:
    """The rate at which memory is read: by the sum of a large matrix."""
    compute = distributed.setup(job["device"], job["dtype"])
    w = torch.ones(50_000 if job["device"] == "cpu" else 1_000_000, 768, device=compute.device, dtype=compute.dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        w.sum().item()  # waits for it
        seconds.append(time.perf_counter() - start)
    return {"bytes_per_s": w.numel() * w.element_size() / min(seconds)}


def suite(cfg: Config, temp: Path) -> dict:
    """A table a batch size. The floor is the slower of two: reading the weights once a step, and the operations."""
    sizes = (cfg.batch_size,) if cfg.batch_size else (1, 16)
    work = prepare(cfg, temp, cfg.init, "hh", "sft", cfg.pairs or max(4, 2 * max(sizes)))
    base = common.base_job(cfg, warmup=1)
    rate, read = base["matmul"], common.measure(reading, base)
    weight_bytes = sum(matrices(work.model)) * (2 if base["dtype"] == "bfloat16" else 4)
    print(f"sample: {cfg.init}, {NEW_TOKENS} new tokens a prompt, greedy; {rate['said']}; {work.source}")
    report = {"matmul": rate, "reading": read, "data": work.source, "sizes": {}}
    for size in sizes:
        prompts = [i.prompt.tolist()[-(common.CONTEXT - NEW_TOKENS) :] for i in work.items[: cfg.pairs or max(4, 2 * size)]]
        job = base | {"folder": work.folder, "prompts": prompts, "batch_size": size, "new": NEW_TOKENS}
        theirs = common.peer_jobs(cfg, transformers_sample, job, SETTINGS)
        results, _ = common.race(cfg, (ours_sample, job), theirs, few={"prompts": prompts[:size], "new": 8})
        written, lengths = len(prompts) * NEW_TOKENS, sorted(map(len, prompts))
        whole = [Encoded(np.array(p), [np.zeros(NEW_TOKENS)], 0, 0) for p in prompts]
        by_sums = flops(whole, work.model, train=False) / rate["flops_per_s"]
        by_reading = -(-len(prompts) // size) * NEW_TOKENS * weight_bytes / read["bytes_per_s"]
        floor = max(by_sums, by_reading)
        print(f"\nbatch {size}: {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {written:,} new tokens")
        common.head("prompts")
        rows = [common.row(name, found, len(prompts), written, floor) for name, found in results.items()]
        print(
            f"floor: {written / floor:.0f} tokens/s, the lower of what reading the weights once a step allows "
            f"({written / by_reading:.0f}, at {read['bytes_per_s'] / 1e9:.1f} GB/s) and what the operations allow "
            f"({written / by_sums:.0f}, at {rate['flops_per_s'] / 1e9:.0f} GFLOP/s)"
        )
        report["sizes"][size] = {"rows": rows, "floor_s": floor, "results": results, "against": {}}
        for other in rows[1:]:
            pairs = zip(results["ours"][0]["tokens"], results[other["name"]][0]["tokens"], strict=True)
            same = sum(a == b for a, b in pairs) / len(prompts)
            report["sizes"][size]["against"][other["name"]] = common.ratios(rows[0], other) | {"same_completions": same}
            print(f"{same:.0%} of the completions are equal")
    return report

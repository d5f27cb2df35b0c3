"""The suite counts: what stands for speed on a GPU and can be counted without one, for a step of a tiny model.

Kernels and waits are counted on a pretended GPU (bench/pretended.py), in bfloat16. Graph breaks and compilations are those of
compiled blocks on the CPU, with a backend that compiles nothing. Host milliseconds are a step of the same model on one CPU
thread, in CPU time: its products take next to no time, so what is left is Python and torch's dispatch, about what a GPU would
wait for.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import logprobs
import weights
from bench import common
from bench.common import Config, prepare
from bench.training import each_step, our_job, ours_train
from data import tokenizer
from generate import stream
from runtime import distributed
from runtime.score import score

NEW = 8  # tokens
COMPILED = {
    "compile": {},
    "compile, activation checkpointing": {"activation_checkpointing": "true"},
    "compile, LoRA": {"lora_rank": 4},
}


def watched_forwards(forwards: Counter):
    """Inside, `forwards` counts the model's forward passes."""
    forward = logprobs.LanguageModel.forward

    def counted(self, batch):
        forwards["forward"] += 1
        return forward(self, batch)

    return mock.patch.object(logprobs.LanguageModel, "forward", counted)


def mean(seen, forwards: float, n: int, unit: str) -> dict:
    """A row: everything that was `seen` (a pretended.Seen), divided by the `n` units in which it was counted."""
    return {
        "unit": unit,
        "forwards": forwards / n,
        "kernels": sum(seen.kernels.values()) / n,
        "syncs": sum(seen.syncs.values()) / n,
        "by_kernel": {name: count / n for name, count in seen.kernels.most_common()},
        "by_sync": {name: count / n for name, count in seen.syncs.most_common() if count},
    }


def training(job: dict) -> dict:
    """A mean step of dpo.py or sft.py after the first."""
    from bench import pretended

    forwards: Counter = Counter()
    with pretended.gpu() as seen, watched_forwards(forwards):
        # a step is read while the next one is under way; the last one, at the end, would have none
        (first, before), *_, (last, after), _ = each_step(lambda: (seen.copy(), forwards.total()), job)
    return mean(last.since(first), after - before, job["steps"] - 1, "step")


def scoring(job: dict) -> dict:
    """A mean forward of the question that precompute_ref.py and eval_mcq.py ask."""
    from bench import pretended

    forwards: Counter = Counter()
    with pretended.gpu() as seen, watched_forwards(forwards):
        compute = distributed.setup("cuda:0", "bfloat16")
        model = weights.load(job["folder"]).to(compute.device)
        before = seen.copy()
        score(model, job["items"], compute, 1024)
    return mean(seen.since(before), forwards.total(), forwards.total(), "forward")


def sampling(job: dict) -> dict:
    """A mean token of greedy sampling, for all prompts at once: `NEW` tokens more, over `NEW`."""
    from bench import pretended

    found = []
    with pretended.gpu() as seen:
        compute = distributed.setup("cuda:0", "bfloat16")
        model = weights.load(job["folder"]).to(compute.device)
        for new in (NEW, 2 * NEW):
            before = seen.copy()
            with compute.autocast(), torch.inference_mode():
                list(stream(model, dict(enumerate(job["prompts"])), new, -1))
            found.append(seen.since(before))
    return mean(found[1].since(found[0]), NEW, NEW, "token")


def compiling(job: dict) -> dict:
    """Graph breaks in all, and graphs compiled in the first step and after it."""
    from torch._dynamo.utils import counters

    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        graphs = each_step(lambda: counters["stats"]["unique_graphs"], job)
    breaks = sum(counters["graph_break"].values())
    return {"graph_breaks": breaks, "graphs": graphs[0], "recompiles": graphs[-1] - graphs[0]}


def suite(cfg: Config, temp: Path) -> dict:
    """A table of counts, one of graphs, and everything as a dict."""
    steps = cfg.pairs // cfg.batch_size
    job = {"threads": 1, "device": "cpu", "dtype": "float32", "warmup": 1, "steps": steps}
    report: dict = {"rows": {}, "compiled": {}}
    folder, tok = temp / "tiny", tokenizer.get("toy")  # a small vocabulary: its projection must not hide what the host does
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), common.SHAPES["tiny"], strict=True))
    weights.save(weights.load("scratch", seed=0, block_size=common.CONTEXT, vocab_size=tok.size, **sizes), tok, folder)
    print(f"{'':14}{'a':>9}{'forwards':>10}{'kernels':>9}{'waits':>7}{'host ms':>9}   what waits")

    def show(name: str, row: dict) -> None:
        report["rows"][name] = row
        waits = ", ".join(f"{count:.3g} {what}" for what, count in row["by_sync"].items())
        host = f"{row['host_ms']:9.1f}" if "host_ms" in row else f"{'':9}"
        print(f"{name:14}{row['unit']:>9}{row['forwards']:10.1f}{row['kernels']:9.0f}{row['syncs']:7.1f}{host}   {waits}")

    for stage in ("sft", "dpo"):
        work = prepare(cfg, temp, str(folder), "counts", stage, cfg.pairs + cfg.batch_size)
        _, ours = our_job(cfg, work, temp, stage, job, {})
        run = common.measure(ours_train, ours)
        there = ours | {"arguments": ours["arguments"] | {"device": "cuda:0", "dtype": "bfloat16"}}
        show(stage, common.measure(training, there) | {"host_ms": 1e3 * run["cpu_seconds"] / run["steps"]})
    more = job | {"folder": work.folder, "items": work.items, "prompts": [i.prompt.tolist()[-256:] for i in work.items[:4]]}
    show("scoring", common.measure(scoring, more))
    show("sampling", common.measure(sampling, more))

    print(f"\n{'dpo, blocks compiled':40}{'graph breaks':>14}{'graphs, step 1':>16}{'later':>7}")
    for name, settings in COMPILED.items():
        _, ours = our_job(cfg, work, temp, "dpo", job, {"compile": "true"} | settings)
        found = report["compiled"][name] = common.attempt(compiling, ours)
        if "error" in found:
            print(f"{name:40}failed: {found['error'][:80]}")
            continue
        print(f"{name:40}{found['graph_breaks']:14}{found['graphs']:16}{found['recompiles']:7}")
    return report | {"data": work.source}

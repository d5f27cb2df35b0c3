"""How fast on a GPU, and where the time goes: training, a profile of one step, sampling, until the time is up.

Needs nothing but torch and this project; TRL and transformers are compared with where they are installed. Every row is in the
file `--out` as soon as it is measured. It runs on a CPU too, which proves that the suite works, and says nothing about a GPU.

A job runs its data twice and only the second pass is timed, so that every shape has been there before. MFU is given twice: of
the datasheet's rate (H100 SXM: 989 TFLOP/s in bfloat16, dense) and of a large matrix product measured in the same run.
"""

import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import budget, common
from bench.common import Config, Work, flops, prepare
from bench.sample import NEW_TOKENS, ours_sample, reading, transformers_sample
from bench.training import each_step, our_job, trl_jobs

SETTINGS = {  # of this project's scripts
    "plain": {},
    "eager": {"compile": "false"},
    "packed": {"row_len": 4096},
    "activation checkpointing": {"activation_checkpointing": "true"},
}
TRL = {
    "TRL, defaults": {"gradient_checkpointing": True},
    "TRL, no checkpointing": {"gradient_checkpointing": False},
    "TRL, 32 a forward": {"gradient_checkpointing": False, "per_device_train_batch_size": 32},
    "TRL, 32 a forward, compiled": {"gradient_checkpointing": False, "per_device_train_batch_size": 32, "torch_compile": True},
}
if find_spec("flash_attn"):  # what padding-free needs
    TRL["TRL, 32 a forward, padding-free"] = TRL["TRL, 32 a forward"] | {
        "padding_free": True,
        "model_init_kwargs": {"attn_implementation": "flash_attention_2"},
    }
TRANSFORMERS = {
    "transformers, defaults": {},
    "transformers, static cache": {"cache_implementation": "static", "by_length": True},
}
BATCHES = (1, 16, 64)  # prompts written at once
PROFILE, SAMPLE = "profile", "sample"
A_JOB = 100  # seconds that a job may take


def profiled(job: dict) -> dict:
    """A step of dpo.py, the one after `warmup`, by its parts in seconds. On a GPU they are of kernels, and what is left of the
    step are gaps between them; on a CPU they are of operations, and what is left is Python."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if job["device"] != "cpu" else []
    profiler, started = torch.profiler.profile(activities=activities), []

    def look() -> None:
        if job["device"] != "cpu":
            torch.cuda.synchronize()
        started.append(time.perf_counter())
        if len(started) == job["warmup"]:
            profiler.start()
            started[-1] = time.perf_counter()
        elif len(started) == job["warmup"] + 1:
            profiler.stop()

    each_step(look, job)
    step = started[job["warmup"]] - started[job["warmup"] - 1]
    parts, busy = Counter(), 0.0
    for event in profiler.events():
        own = event.self_device_time_total if job["device"] != "cpu" else event.self_cpu_time_total
        if event.device_type == torch.autograd.DeviceType.CPU:
            parts[budget.part_of(event)] += own / 1e6
        elif not event.is_user_annotation:
            busy += event.time_range.elapsed_us() / 1e6
    parts["element-wise"] += max(0.0, busy - parts.total())  # kernels that no operation of torch's launched: compiled ones
    names = [part for part in budget.PARTS if part != "gaps"]
    return {"step_s": step, "parts": {n: parts[n] for n in names} | {"gaps": step - sum(parts[n] for n in names)}}


def cases(cfg: Config) -> list[tuple[str, str, str, str]]:
    """(stage, data, model, setting), the most telling first."""
    models, first = cfg.models.split(","), cfg.models.split(",")[:2]
    peer = list(TRL) if cfg.peer != "none" and find_spec("trl") else []
    written = ["ours", *(TRANSFORMERS if cfg.peer != "none" and find_spec("transformers") else ())]
    plain, *others = SETTINGS
    order = [
        *(("dpo", "hh", model, name) for model in first for name in (plain, PROFILE)),
        *(("dpo", "hh", model, name) for model in first for name in peer),
        *((f"{SAMPLE} {n}", "hh", model, name) for model in first for n in BATCHES for name in written),
        *(("sft", "hh", model, name) for model in first for name in (plain, *peer)),
        *(("dpo", "hh", model, name) for name in others for model in first),
        *((stage, "hellaswag", model, plain) for model in first for stage in ("dpo", "sft")),
        *((stage, "hh", model, plain) for model in models if model not in first for stage in ("dpo", "sft")),
    ]
    return list(dict.fromkeys(order))


def suite(cfg: Config, temp: Path) -> dict:
    """A row a case, with its share of the matrix product's rate (MFU)."""
    end, steps = time.monotonic() + 60 * cfg.minutes, cfg.pairs // cfg.batch_size
    base = common.base_job(cfg, steps)
    rate = base["matmul"]
    report: dict = {"matmul": rate, "reading": common.measure(reading, base), "rows": [], "left_out": []}
    print(
        f"{rate['said']}: matrix product {rate['flops_per_s'] / 1e12:.2f} TFLOP/s in {rate['dtype']}, "
        f"reading {report['reading']['bytes_per_s'] / 1e9:.0f} GB/s"
    )
    if cfg.device == "cpu":
        print("on a CPU: proves that the suite runs, says nothing about a GPU")
    print(f"{'':52}{'/s':>10}{'step ms':>10}{'tokens/s':>10}{'peak MB':>10}   share of the rate")
    for case in cases(cfg):
        label = " ".join(case)
        left = end - time.monotonic()
        if left <= 0:
            report["left_out"].append(label)
            continue
        stage, kind, model, name = case
        try:  # what goes before a job can fail too: a folder of weights, a reference pass
            work = prepare(cfg, temp, model, kind, "sft" if SAMPLE in stage else stage, cfg.pairs)
            result = common.attempt(*job_of(cfg, work, temp, base, case, min(A_JOB, left)))
        except Exception as error:
            result = {"error": common.last_line(error)}
        if "error" in result:
            row = {"error": result["error"]}
            print(f"{label:52}failed: {result['error'][:100]}", flush=True)
        elif name == PROFILE:
            row = profile_row(label, result, work, cfg)
        elif SAMPLE in stage:
            row = sample_row(label, result, work, rate, report["reading"])
        else:
            row = training_row(label, result, work, rate)
        report["rows"].append({"name": label} | row)
        common.write(cfg, report)
    if report["left_out"]:
        print(f"left out, the {cfg.minutes:g} minutes were up: {', '.join(report['left_out'])}")
    print("MFU: useful operations (a prompt once) a second, of the datasheet's rate and of the measured matrix product's")
    return report


def job_of(cfg: Config, work: Work, temp: Path, base: dict, case: tuple[str, str, str, str], limit: float) -> common.Job:
    stage, _, _, name = case
    base = base | {"limit_s": limit}
    if SAMPLE in stage:
        size = int(stage.split()[1])
        prompts = [i.prompt.tolist()[-(common.CONTEXT - NEW_TOKENS) :] for i in work.items[: max(4, size)]]
        job = {"folder": work.folder, "prompts": prompts, "batch_size": size, "new": NEW_TOKENS, "again": True}
        settings = {"settings": TRANSFORMERS.get(name, {})}
        return ours_sample if name == "ours" else transformers_sample, base | job | settings
    if name in TRL:
        return trl_jobs(cfg, work, temp, stage, base, {name: TRL[name] | {"num_train_epochs": 2}})[name]
    function, job = our_job(cfg, work, temp, stage, base, SETTINGS.get(name, {}) | {"epochs": 2})
    return (profiled if name == PROFILE else function), job


def training_row(label: str, result: dict, work: Work, rate: dict) -> dict:
    """Print and return the timed pass over all examples."""
    seconds, useful = result["seconds"], flops(work.items, work.model, train=True)
    row = {
        "seconds": seconds,
        "per_s": len(work.items) / seconds,
        "step_s": seconds / result["steps"],
        "tokens_per_s": sum(i.row_tokens for i in work.items) / seconds,
        "peak_mb": result["peak_mb"],
        "useful_tflops": useful / seconds / 1e12,
        "mfu_datasheet": useful / seconds / budget.H100,
        "mfu_measured": useful / seconds / rate["flops_per_s"],
        "losses": [r["loss"] for r in result["records"]],
    }
    show(label, row, f"MFU {row['mfu_datasheet']:.1%} of an H100's datasheet, {row['mfu_measured']:.1%} of the product")
    return row


def sample_row(label: str, result: dict, work: Work, rate: dict, read: dict) -> dict:
    """Print and return how fast completions were written, with the share of bandwidth that reading the weights is."""
    n, seconds = len(result["tokens"]), result["seconds"]
    size = int(label.split()[1])
    weight_bytes = sum(common.matrices(work.model)) * (2 if rate["dtype"] == "bfloat16" else 4)
    reads = -(-n // size) * NEW_TOKENS / seconds  # passes over the weights a second
    row = {"seconds": seconds, "per_s": n / seconds, "step_s": 1 / reads, "tokens_per_s": n * NEW_TOKENS / seconds}
    row |= {"peak_mb": result["peak_mb"], "bandwidth_share": reads * weight_bytes / read["bytes_per_s"]}
    show(label, row, f"{row['bandwidth_share']:.1%} of the bandwidth")
    return row


def profile_row(label: str, result: dict, work: Work, cfg: Config) -> dict:
    """Print and return the parts of a step beside what arithmetic says of them on an H100."""
    expected = budget.step(work.items[: cfg.batch_size], work.model)
    print(f"{label}: a step of {1e3 * result['step_s']:.1f} ms")
    for part, seconds in result["parts"].items():
        estimate = f"{1e3 * expected[part]:10.1f} ms estimated for an H100" if part in expected else ""
        print(f"    {part:14}{1e3 * seconds:10.1f} ms {seconds / result['step_s']:6.1%}{estimate}")
    return result | {"estimated": expected}


def show(label: str, row: dict, share: str) -> None:
    print(
        f"{label:52}{row['per_s']:10.2f}{1e3 * row['step_s']:10.1f}{row['tokens_per_s']:10.0f}{row['peak_mb']:10.0f}   {share}",
        flush=True,
    )

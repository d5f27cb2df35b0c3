"""The suites dpo and sft: dpo.py against TRL's DPOTrainer on preference pairs, sft.py against its SFTTrainer on prompts and
completions. Neither's reference pass is timed."""

import importlib
import sys
from pathlib import Path
from unittest import mock

import torch

from bench import common, peers
from bench.common import KEEP, Config, Job, Work, flops, prepare

TRL_SETTINGS = {
    "TRL, defaults": {"gradient_checkpointing": True},
    "TRL, no checkpointing": {"gradient_checkpointing": False},
    "TRL, one example a forward": {"gradient_checkpointing": False, "per_device_train_batch_size": 1},
    "TRL, one a forward, memory kept": {"gradient_checkpointing": False, "per_device_train_batch_size": 1, "env": KEEP},
}


def script(name: str, arguments: dict) -> None:
    """Run one of our scripts in this process."""
    sys.argv = [name + ".py", *(f"--{k}={v}" for k, v in arguments.items())]
    status = importlib.import_module(name).main()
    if status:
        raise RuntimeError(f"{name}.py ended with {status}")


def ours_train(job: dict) -> dict:
    """sft.py or dpo.py as they are, but for saving, watched at the end of every step."""
    from runtime.run import Run

    ends, records = [], []
    log_step = Run.log_step

    def watched(self, step, record, *rest):
        log_step(self, step, record, *rest)
        ends.append(peers.now())
        records.append(record)

    Run.log_step = watched
    Run.save = Run.finish = lambda *_: None
    script(job["stage"], job["arguments"])
    return {"ends": ends[job["warmup"] - 1 :], "records": records}


def each_step(look, job: dict) -> list:
    """Run a stage; what `look()` gave at the end of every step."""
    from runtime.run import Run

    found: list = []
    log_step = Run.log_step

    def watched(*arguments) -> None:
        log_step(*arguments)
        found.append(look())

    with mock.patch.object(Run, "log_step", watched):
        ours_train(job)
    return found


def ours_reference(job: dict) -> dict:
    script("precompute_ref", job["arguments"])
    return {}


def trl_train(job: dict) -> dict:
    """TRL's trainer on the same texts; nothing is saved, and its reference pass is over (or cached) before the clock runs."""
    sync = torch.cuda.synchronize if job["device"] != "cpu" else None
    make = {"dpo": peers.dpo_trainer, "sft": peers.sft_trainer}[job["stage"]]
    settings = job["settings"] | {"max_steps": job.get("max_steps", -1)}  # -1: all of the data
    trainer, watch = make(job["folder"], job["data"], job["temp"], sync=sync, **settings)
    with peers.quiet():
        trainer.train()
    return {"ends": watch.ends[job["warmup"] - 1 :], "records": watch.logs}


def our_job(cfg: Config, work: Work, temp: Path, stage: str, base: dict, more: dict) -> Job:
    """What dpo.py or sft.py is told; for dpo.py the reference pass is run first, once. more: further keys of the script."""
    shared = {"init_from": work.folder, "data": work.data, "device": base["device"], "dtype": base["dtype"]}
    arguments = shared | more | {
        "out_dir": temp / "run", "overwrite": "true", "shuffle": "false", "batch_size": cfg.batch_size, "samples": 0,
        "lr": cfg.lr, "schedule": "constant", "seed": cfg.seed,
    }  # fmt: skip
    if stage == "dpo":
        arguments["ref"] = ref = work.data.with_suffix(f".{work.folder.name}.safetensors")
        if not ref.exists():
            common.measure(ours_reference, base | {"arguments": shared | {"out": ref}})
    return ours_train, base | {"stage": stage, "arguments": arguments}


def trl_jobs(cfg: Config, work: Work, temp: Path, stage: str, base: dict, settings_of: dict | None = None) -> dict[str, Job]:
    """What TRL's trainer is told, in each of its settings (or those given)."""
    job = base | {"stage": stage, "folder": work.folder, "data": work.data, "temp": temp / "trl"}
    settings = {}
    for name, more in (settings_of or TRL_SETTINGS).items():
        per_forward = min(cfg.batch_size, more.get("per_device_train_batch_size", 8))  # transformers' default is 8
        settings[name] = more | {
            "per_device_train_batch_size": per_forward, "gradient_accumulation_steps": cfg.batch_size // per_forward,
            "learning_rate": cfg.lr, "use_cpu": base["device"] == "cpu", "bf16": base["dtype"] == "bfloat16", "seed": cfg.seed,
        }  # fmt: skip
    return common.peer_jobs(cfg, trl_train, job, settings)


def suite(cfg: Config, temp: Path) -> dict:
    """Ours against TRL's trainer: a table, the losses side by side, and everything as a dict."""
    work = prepare(cfg, temp, cfg.init, "hh", cfg.suite, cfg.pairs + cfg.batch_size)
    base = common.base_job(cfg, warmup=1)
    ours, theirs = our_job(cfg, work, temp, cfg.suite, base, {}), trl_jobs(cfg, work, temp, cfg.suite, base)
    cost = flops(work.items[cfg.batch_size :], work.model, train=True)
    unit = {"dpo": "pairs", "sft": "examples"}[cfg.suite]
    report = common.compare(cfg, work, base, unit, cost, ours, theirs, few={"max_steps": 3})
    if peer := report.get("compared"):
        report["same_work"] = same_steps(report["results"]["ours"][0]["records"], report["results"][peer][0]["records"])
    return report


def same_steps(ours: list[dict], theirs: list[dict]) -> dict:
    """Print losses (and what else both logged) side by side, a line a step; return the largest differences."""
    names = [k for k in ("loss", "grad_norm", "logps/chosen", "logps/rejected") if k in ours[0]]
    print("\nstep" + "".join(f"{'ours ' + k:>22}{'theirs':>14}" for k in names))
    gaps = []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
        print(f"{i:4}" + "".join(f"{a[k]:22.6f}{b[k]:14.6f}" for k in names))
        gaps.append({k: abs(a[k] - b[k]) for k in names})
    largest = {k: max(gap[k] for gap in gaps) for k in names}
    print("largest difference: " + ", ".join(f"{k} {v:.1e}" for k, v in largest.items()))
    return {"largest": largest, "first_step": gaps[0]}

"""This project and its peers, side by side: the same work in one run, every measurement in a process of its own.

    python -m bench --suite dpo --pairs 32 --out dpo.json        dpo.py against TRL's DPOTrainer; --suite sft likewise
    python -m bench --suite rows --pairs 12 --out rows.json      dpo.py: six pairs of four completions in a row, and apart
    python -m bench --suite mcq --pairs 100 --out mcq.json       eval_mcq.py against lm-evaluation-harness
    python -m bench --suite sample --out sample.json             sample.py against transformers' generate, batch 1 and 16
    python -m bench --suite gpu --out gpu.json                   dpo.py and sft.py on a GPU: needs nothing but torch
    python -m bench --suite counts                               kernels, waits and compilations of a step, without a GPU

Losses, log-likelihoods or completions stand side by side as proof that the work was the same.
"""

from base.script import run

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from base.files import write_whole
from bench import counts, gpu, mcq, rows, sample, training
from bench.common import Config
from runtime import config

SUITES = {"dpo": training.suite, "sft": training.suite, "rows": rows.suite, "mcq": mcq.suite, "sample": sample.suite,
          "gpu": gpu.suite, "counts": counts.suite}  # fmt: skip


def main() -> None:
    cfg = config.load(Config, prog="-m bench")
    with tempfile.TemporaryDirectory(prefix="nanopref_bench_") as temp:
        report = SUITES[cfg.suite](cfg, Path(temp))
    report |= {"config": dataclasses.asdict(cfg), "commit": commit(), "versions": versions()}
    if cfg.out:
        write_whole(cfg.out, json.dumps(report, indent=1) + "\n")
        print(f"wrote {cfg.out}")


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    peers = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "lm_eval") if find_spec(name)}
    return {"python": platform.python_version(), **peers}


if __name__ == "__main__":
    run(main)

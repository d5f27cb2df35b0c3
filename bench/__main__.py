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

import tempfile
from pathlib import Path

from bench import common, counts, gpu, mcq, rows, sample, training
from bench.common import Config
from runtime import config

SUITES = {"dpo": training.suite, "sft": training.suite, "rows": rows.suite, "mcq": mcq.suite, "sample": sample.suite,
          "gpu": gpu.suite, "counts": counts.suite}  # fmt: skip


def main() -> None:
    cfg = config.load(Config, prog="-m bench")
    with tempfile.TemporaryDirectory(prefix="nanopref_bench_") as temp:
        report = SUITES[cfg.suite](cfg, Path(temp))
    common.write(cfg, report)
    if cfg.out:
        print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run(main)

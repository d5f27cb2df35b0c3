"""A checkpoint of a run, or an adapter and its base -> a model's folder.

    python -m tools.export --model runs/sft/checkpoints/step_500 --out runs/step_500

A run's end is in its model/ already. With LoRA the adapter is merged into its base.
"""

from base.script import run

from dataclasses import dataclass

import adapters
import weights
from data.tokenizer import choose
from runtime import config
from runtime.config import REQUIRED, key


@dataclass
class Config:
    """Write a checkpoint, or an adapter with its base, as a folder that transformers loads."""

    model: str = key(REQUIRED, "a folder of a model, adapter or run, or RUN/checkpoints/step_N", model=True)
    out: str = key(REQUIRED, "the model folder to write", replaces=[""])


def main() -> None:
    cfg = config.load(Config, prog="-m tools.export")
    found = adapters.source(cfg.model)
    weights.save_tensors(found.config, found.tensors, choose("auto", cfg.model), cfg.out)
    print(f"wrote {cfg.out}: {found.config}, the weights of {cfg.model}")


if __name__ == "__main__":
    run(main, alone=True)

"""Host memory that each rank gains while a model of random weights is made on rank 0 and handed out to its shards:

    PYTHONPATH=. torchrun --nproc_per_node 4 tests/runtime/start_memory.py gpt2-large
    PYTHONPATH=. torchrun --nproc_per_node 4 tests/runtime/start_memory.py 8,8,1024      (layers, heads, width)

Prints, for every rank, the gain of its peak and the bytes of its shard, and the bytes of the whole model.
"""

import json
import sys
from pathlib import Path

import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401  (imported before the count begins)

from data.tokenizer import get
from model import SIZES
from runtime import distributed
from runtime.build import build_model
from runtime.keys import TrainKeys


def peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def main() -> None:
    layers, heads, width = SIZES.get(sys.argv[1]) or map(int, sys.argv[1].split(","))
    sizes = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": 1024}
    cfg = TrainKeys(data="none", out_dir="none", init_from="scratch", **sizes)
    compute, tokenizer = distributed.setup("cpu"), get("gpt2")
    before = peak()
    model = build_model(cfg, tokenizer, compute)
    parameters = list(model.parameters())
    mine = (peak() - before, 4 * sum(distributed.own(p).numel() for p in parameters))
    grown, shards = zip(*compute.gather(mine), strict=True)
    print(json.dumps({"grown": grown, "shards": shards, "model": 4 * sum(p.numel() for p in parameters)}))


if __name__ == "__main__":
    main()

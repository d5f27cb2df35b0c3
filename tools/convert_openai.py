"""OpenAI's release of GPT-2, TensorFlow checkpoints, -> a folder that every script here and transformers load.

    python -m tools.convert_openai --size 124M --out runs/gpt2          downloads the checkpoint
    python -m tools.convert_openai --folder models/124M --out runs/gpt2

Then `--init_from runs/gpt2`. The checkpoint's files (see https://github.com/openai/gpt-2, download_model.py) are hparams.json,
model.ckpt.index and model.ckpt.data-00000-of-00001. The weights go from file to file a tensor at a time.
"""

from base.script import run

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import weights
from base.download import cache_dir, fetch, openai_endpoint
from base.errors import UserError
from base.files import expand, read_json
from data import tokenizer
from model import GPT, GPTConfig
from runtime.config import REQUIRED, key, load
from tools.tf_checkpoint import Index, read_index, read_tensor

HPARAMS, INDEX, DATA = "hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001"
SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_ctx": "block_size", "n_vocab": "vocab_size"}
PARTS = {"ln1": "ln_1", "ln2": "ln_2", "qkv": "c_attn", "proj": "c_proj", "fc": "c_fc"}  # our names -> theirs


@dataclass
class Config:
    """Write OpenAI's released GPT-2 weights as a model folder."""

    out: str = key(REQUIRED, "the model folder to write", replaces=("",))
    size: str = key("124M", "which released model to download", ["124M", "355M", "774M", "1558M"])
    folder: str = key("", "a folder that holds the checkpoint's three files, instead of downloading them")


def main() -> None:
    cfg = load(Config, prog="-m tools.convert_openai")
    config = read_hparams(_file(cfg, HPARAMS))
    index = read_index(_file(cfg, INDEX))
    data = _file(cfg, DATA)
    weights.save_tensors(config, read_tensors(weights.empty(config), index, data), tokenizer.get("gpt2"), cfg.out)
    print(f"{cfg.out}: GPT-2 with {config.n_layer} layers, from {data.parent}")


def _file(cfg: Config, name: str) -> Path:
    if not cfg.folder:
        url = f"{openai_endpoint()}/gpt-2/models/{cfg.size}/{name}"
        return fetch(url, cache_dir() / "openai" / cfg.size / name)
    path = expand(cfg.folder) / name
    if not path.is_file():
        raise UserError(f"key folder: no {name} in {cfg.folder}: copy it there, a checkpoint is {HPARAMS}, {INDEX} and {DATA}")
    return path


def read_hparams(path: Path) -> GPTConfig:
    """OpenAI's hparams.json -> the model's config. Raises UserError, naming the key, for what is missing or no size."""
    raw = read_json(path)
    sizes = {name: raw.get(name) for name in SIZES}
    for name, size in sizes.items():
        if type(size) is not int or size <= 0:
            raise UserError(f"{path}: {name} is {size!r}, not a positive whole number: get the file again")
    try:
        return weights.bounded(GPTConfig(**{ours: sizes[name] for name, ours in SIZES.items()}))
    except ValueError as error:
        raise UserError(f"{path}: {error}: get the file again") from None


def read_tensors(model: GPT, index: Index, data: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) for every parameter of `model`, read from the checkpoint one at a time.

    Their matrices are convolutions one token wide, of shape (1, in, out), where ours are (out, in).
    """
    for name, p in model.named_parameters():
        found = torch.from_numpy(read_tensor(index, their_name(name, p.dim()), p.numel(), data))
        yield name, found.view(p.shape[::-1]).t() if name.startswith("blocks.") else found.view(p.shape)


def their_name(name: str, dim: int) -> str:
    """Our name of a parameter of `dim` dimensions -> theirs: blocks.0.attn.qkv.weight -> model/h0/attn/c_attn/w."""
    *path, last = re.sub(r"^blocks\.", "h", name).split(".")
    letter = "b" if last == "bias" else "g" if dim == 1 else "w"
    end = [] if path[0] in ("wte", "wpe") else [letter]
    return "/".join(["model", *(PARTS.get(part, part) for part in path), *end])


if __name__ == "__main__":
    run(main, alone=True)

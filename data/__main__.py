"""Write a recipe's split, or a file, in the format of your own files: for sampling and judging, or to look at.

python -m data --data hh --split test --view prompts --limit 250 --out runs/hh_prompts.jsonl
"""

from base.script import run

import json
from dataclasses import dataclass, replace

from base.files import write_whole
from base.progress import count
from data import VIEWS, Example, check_data, load
from data.examples import PLAIN
from data.tokenizer import get
from runtime import config
from runtime.config import REQUIRED, key
from runtime.keys import FileKeys


@dataclass
class Config(FileKeys):
    """Write a recipe's examples to a JSONL file."""

    data: str = key(REQUIRED, "a recipe (hh, alpaca, …), a file, or hub:owner/name[:config]", reads=check_data)
    split: str = key("test", "the split of a recipe (train, val, test) or of the hub's data set")
    view: str = key("prompts", "prompts: prompt and chosen, for sample.py and judges; else as in training", ["prompts", *VIEWS])
    limit: int = key(0, "only the first so many problems, 0 = all", least=0)
    val_share: float = key(
        0.0, "only the prompts of a file that sft.py and dpo.py keep back with this val_share", least=0, below=1
    )
    out: str = key(REQUIRED, "the .jsonl file to write", writes=".jsonl")


def as_record(example: Example, view: str) -> dict:
    """An example of texts as a line in the view's format."""
    if view in ("mcq", "loglik"):
        return {"prompt": example.prompt, "choices": example.completions, "label": example.label}
    if example.is_chat and not example.prompt:
        return {"messages": example.completions[0]}
    if len(example.completions) > 2 or (len(example.completions) == 2 and example.pairs != PLAIN):
        return {"prompt": example.prompt, "completions": example.completions, "pairs": example.pairs}
    names = {"prompts": ("chosen",), "sft": ("completion",), "preference": ("chosen", "rejected")}[view]
    return {"prompt": example.prompt, **dict(zip(names, example.completions, strict=True))}


def to_text(examples: list[Example]) -> list[Example]:
    """Examples as text. Token ids are decoded, without <|endoftext|>; prints how many of them a tokenizer would not read back
    as the same ids."""
    if all(isinstance(example.prompt, str) or example.is_chat for example in examples):
        return examples
    tokenizer, made, changed = get("gpt2"), [], 0
    for e in examples:
        ids = [[i for i in part if i != tokenizer.eot] for part in (e.prompt, *e.completions)]
        prompt, *completions = texts = [tokenizer.decode(part) for part in ids]
        changed += tokenizer.encode_batch(texts) != ids
        made.append(replace(e, prompt=prompt, completions=tuple(completions)))
    if changed:
        print(f"{changed:,} of {len(examples):,} examples, written as text, have other token ids when they are read again")
    return made


def main() -> None:
    cfg = config.load(Config, prog="-m data")
    view = "sft" if cfg.view == "prompts" else cfg.view
    how = {"data_dir": cfg.data_dir, "columns": cfg.columns, "limit": cfg.limit, "min_gap": cfg.min_gap}
    half = ("val", cfg.val_share) if cfg.val_share else None
    examples = to_text(load(cfg.data, cfg.split, view, **how, half=half))
    write_whole(cfg.out, "".join(json.dumps(as_record(e, cfg.view), ensure_ascii=False) + "\n" for e in examples))
    print(f"wrote {cfg.out}: {count(len(examples), 'lines')}")


if __name__ == "__main__":
    run(main, alone=True)

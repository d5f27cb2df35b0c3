"""Multiple-choice evaluation: which option does the model believe, or write?

    python eval_mcq.py --model runs/hellaswag_dpo/model --data hellaswag --mode loglik --out loglik.json
    python eval_mcq.py --model runs/hellaswag_dpo/model --data hellaswag --mode generate --limit 2000 --out generate.json

loglik takes the option with the largest log-probability after the prompt (`acc`), and with the largest per byte (`acc_norm`),
as lm-evaluation-harness does (there the latter is called acc_bytes). generate asks, writes greedily, and looks for the answer
among the options (`acc`; `aligned` is the share of answers that are one of the options at all, right or wrong).
"""

from base.script import run

import json
import math
from dataclasses import dataclass

import generate
from base.errors import UserError
from base.files import check_there, write_whole
from base.progress import Progress
from data import Example, check_data, load
from data.encode import CUT, Encoded, encode
from data.tokenizer import choose
from runtime import config, distributed
from runtime.build import build_model
from runtime.config import REQUIRED, key
from runtime.keys import DeviceKeys, ModelKeys
from runtime.log import Timer
from runtime.score import score
from weights import check_model


@dataclass
class Config(DeviceKeys):
    """Accuracy on multiple-choice questions."""

    model: str = key(
        REQUIRED,
        "a folder of a model, adapter or run; gpt2 (-medium, …); owner/name on the hub",
        model=True,
        reads=check_model,
    )
    data: str = key(REQUIRED, "a recipe (toy, hellaswag), a file, or hub:owner/name[:config]", reads=check_data)
    columns: str = key("", "columns of a file by your names for them: prompt=question,choices=a; empty = as they are")
    data_dir: str = key("", "folder that holds a recipe's files, instead of downloading them", reads=check_there)
    split: str = key("val", "the split of a recipe (train, val, test) or of the hub's data set")
    limit: int = key(0, "use only the first so many problems, 0 = all", least=0)
    mode: str = key("loglik", "score the options, or write an answer", ["loglik", "generate"])
    tokenizer: str = key("auto", "gpt2, toy, a folder, or auto = the model's own")
    out: str = key("", "JSON file for the result", writes="")
    details: str = key("", "JSONL file for a line a problem", writes="")
    micro_tokens: int = key(8192, "loglik: most tokens in one forward, padding included", least=1)
    batch_size: int = key(32, "generate: prompts written at once", least=1)
    max_new_tokens: int = key(0, "generate: most tokens of an answer, 0 = those of the batch's longest option", least=0)


def write_answers(model, items: list[Encoded], tokenizer, compute, batch_size: int, max_new_tokens: int) -> list[str]:
    """A greedy answer to every item's prompt, on every rank. Prompts of like length go together."""
    answers: dict[int, str] = {}
    order = sorted(range(len(items)), key=lambda i: -len(items[i].prompt))
    groups = [order[at : at + batch_size] for at in range(0, len(order), batch_size)][compute.rank :: compute.world]
    progress = Progress("writing", sum(map(len, groups)), "examples", compute.rank)
    for group in groups:
        new = max_new_tokens or max(len(c) for i in group for c in items[i].completions)
        try:
            with compute.autocast():
                prompts = [items[i].prompt.tolist() for i in group]
                written = generate.greedy(model, prompts, new, tokenizer.stops, tokenizer.size)
        except FloatingPointError as error:
            raise UserError(f"key model: {error}: its weights are damaged", here=True) from None
        answers |= {i: tokenizer.decode(ids) for i, ids in zip(group, written, strict=True)}
        progress.add(len(group))
    progress.close()
    everything = {i: answer for part in compute.gather(answers) for i, answer in part.items()}
    return [everything[i] for i in range(len(items))]


def option_bytes(option: str) -> int:
    """An option's length as the harness counts it: UTF-8 bytes without the space that joins it to the prompt."""
    return max(1, len(option.strip().encode()))


def share(flags: list[bool], name: str) -> dict:
    """Mean and its standard error, sqrt(p (1 - p) / (n - 1)), as the harness gives it."""
    n, p = len(flags), sum(flags) / len(flags)
    return {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0}


def grade_loglik(examples: list[Example], items: list[Encoded], logps: list[list[float]]) -> tuple[dict, list[dict]]:
    """(result, a detail a problem) from the options' log-probs.

    Options of the same text are one option: they get one log-prob, whatever rounding made of each, the first of them is chosen,
    and it is right if the right one reads the same. Other ties go to the first option too.
    """
    details, right, right_norm = [], [], []
    for example, item, scores in zip(examples, items, logps, strict=True):
        options = example.completions
        scores = [scores[options.index(option)] for option in options]
        per_byte = [s / option_bytes(c) for s, c in zip(scores, options, strict=True)]
        pred, pred_norm = scores.index(max(scores)), per_byte.index(max(per_byte))
        right.append(options[pred] == options[example.label])
        right_norm.append(options[pred_norm] == options[example.label])
        detail = {"id": item.number, "label": example.label, "pred": pred, "pred_norm": pred_norm}
        details.append(detail | {"logps": scores, "n_tokens": [len(c) for c in item.completions]})
    return {"n": len(right), **share(right, "acc"), **share(right_norm, "acc_norm")}, details


def grade_written(examples: list[Example], items: list[Encoded], answers: list[str]) -> tuple[dict, list[dict]]:
    """(result, a detail a problem) from written answers; `pred` is null where the answer is none of the options."""
    details, right = [], []
    for example, item, answer in zip(examples, items, answers, strict=True):
        options = [c.strip() for c in example.completions]
        pred = options.index(answer.strip()) if answer.strip() in options else None
        # two options may read the same: the answer is right if it reads like the right one
        right.append(pred is not None and options[pred] == options[example.label])
        details.append({"id": item.number, "label": example.label, "pred": pred, "text": answer})
    aligned = sum(d["pred"] is not None for d in details) / len(details)
    return {"n": len(right), **share(right, "acc"), "aligned": aligned}, details


def evaluate(model, tokenizer, examples: list[Example], cfg: Config, compute) -> tuple[dict, list[dict], float]:
    """(result, details, seconds) of `examples` in the mode's view. Prompts too long for the model lose their start."""
    room = model.config.block_size
    items, report = encode(examples, tokenizer, room, "left", end=cfg.mode == "generate")
    if CUT in report:
        print(f"{report}: the model has room for {room}")
    seconds = Timer(compute.device)
    if cfg.mode == "loglik":
        logps = [sums.tolist() for sums in score(model, items, compute, cfg.micro_tokens, "scoring")]
        result, details = grade_loglik(examples, items, logps)
    else:
        answers = write_answers(model, items, tokenizer, compute, cfg.batch_size, cfg.max_new_tokens)
        result, details = grade_written(examples, items, answers)
    return result, details, seconds.lap()


def main() -> None:
    cfg = config.load(Config, prog="eval_mcq.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    print(compute)
    tokenizer = choose(cfg.tokenizer, cfg.model)
    model = build_model(ModelKeys(init_from=cfg.model), tokenizer, compute)
    view = "loglik" if cfg.mode == "loglik" else "mcq"
    where = {"data_dir": cfg.data_dir, "limit": cfg.limit, "columns": cfg.columns}
    examples = compute.once(lambda: load(cfg.data, cfg.split, view, **where))
    result, details, seconds = evaluate(model, tokenizer, examples, cfg, compute)

    chance = sum(1 / len(e.completions) for e in examples) / len(examples)
    if cfg.details:
        compute.once(lambda: write_whole(cfg.details, "".join(json.dumps(d) + "\n" for d in details)))
    if cfg.out:
        settings = {"model": cfg.model, "data": cfg.data, "split": cfg.split, "mode": cfg.mode, "chance": chance}
        compute.once(lambda: write_whole(cfg.out, json.dumps({**result, **settings}, indent=1) + "\n"))
    print(f"{len(examples) / seconds:.1f} examples/s, {seconds:.1f} s; chance is {chance:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)

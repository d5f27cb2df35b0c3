"""`make demo`: the whole way on a toy task, from scratch, on a CPU, without a network. Each command is printed before it runs.

SFT on demonstrations of which half skip a step; the reference pass; DPO. Beside it: as many tokens of further SFT, on the
demonstrations and on the chosen endings, and DPO with the reference log-probs of the wrong model.
"""

from base.script import run

import importlib
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError, warn
from base.files import write_whole
from data import load
from report.plot import figure, save
from report.runs import read_run, series
from runtime import config
from runtime.config import key

MARK = ".demo"  # tells a folder in which `MADE` may be deleted from one of the user's
LABELS = {"sft": "SFT", "more": "further SFT", "chosen": "SFT on chosen", "dpo": "DPO", "wrong": "DPO, wrong reference"}

MADE = (*LABELS, "ref.safetensors", "wrong_ref.safetensors", "chosen.jsonl", "results.json", "demo.png")


@dataclass
class Config:
    """SFT, reference, DPO and evaluation of a small model on the toy task."""

    out_dir: str = key("runs/demo", "folder for everything; what an earlier demo left there is deleted")
    seed: int = key(0, "seed of weights and data order")
    sft_steps: int = key(450, "steps of SFT", least=1)
    dpo_steps: int = key(100, "steps of DPO", least=1)
    problems: int = key(2000, "held-out problems to evaluate on", least=1, most=2000)


def step(name: str, **keys: object) -> None:
    """Print a stage's command and run it in this process."""
    words = [word for k, v in keys.items() for word in (f"--{k}", str(v))]
    print(f"\n$ python {name}.py {' '.join(words)}", flush=True)
    sys.argv = [f"{name}.py", *words]
    status = importlib.import_module(name).main()
    if status:  # Ctrl-C or SIGTERM: the stage has saved and said so
        sys.exit(status)


def evaluate(folder: Path, n: int) -> dict:
    """Accuracy by likelihood and by what the model writes, on `n` held-out problems of the test split."""
    found = {}
    for mode in ("loglik", "generate"):
        out = folder / f"{mode}.json"
        step("eval_mcq", model=folder / "model", data="toy", split="test", limit=n, mode=mode, out=out)
        found[mode] = json.loads(out.read_text())
    likeliest, written = found["loglik"], found["generate"]
    results = {name: likeliest[name] for name in ("n", "acc", "acc_stderr")}
    return results | {"written_acc": written["acc"], "written_acc_stderr": written["acc_stderr"], "aligned": written["aligned"]}


def trained_tokens(folder: Path) -> int:
    return sum(r["tokens"] for r in read_run(folder) if r["split"] == "train")


def main() -> None:
    cfg = config.load(Config, prog="demo.py")
    begin, out = time.monotonic(), Path(cfg.out_dir)
    if out.exists() and not (out / MARK).exists():
        raise UserError(f"out_dir {out} is there and was not made by a demo: name another folder")
    write_whole(out / MARK, "made by demo.py, which deletes what it made here when it runs again\n")
    for path in (out / name for name in MADE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    sft, dpo = {"config": "configs/toy_sft.toml", "seed": cfg.seed}, {"config": "configs/toy_dpo.toml", "seed": cfg.seed}
    model, refs = out / "sft" / "model", {"dpo": out / "ref.safetensors", "wrong": out / "wrong_ref.safetensors"}
    data = {"data": "toy", "limit": 6400, "val_limit": 300}

    step("sft", **sft, max_steps=cfg.sft_steps, out_dir=out / "sft", samples=1)
    step("precompute_ref", init_from=model, **data, out=refs["dpo"])
    step("dpo", **dpo, max_steps=cfg.dpo_steps, init_from=model, ref=refs["dpo"], out_dir=out / "dpo", samples=1)

    # the same number of tokens of further SFT, at DPO's learning rate: on more demonstrations, and on the chosen endings
    chosen = out / "chosen.jsonl"
    pairs = load("toy", "train", "preference")[::3]
    write_whole(chosen, "".join(json.dumps({"prompt": p.prompt, "completion": p.completions[0]}) + "\n" for p in pairs))
    per_step = trained_tokens(out / "sft") / cfg.sft_steps
    further = {"max_steps": math.ceil(trained_tokens(out / "dpo") / per_step), "init_from": model, "warmup": 20, "samples": 0}
    further |= {"lr": 3e-4, "min_lr": 0, "n_layer": 0, "n_head": 0, "n_embd": 0, "block_size": 0, "seed": cfg.seed + 1}
    step("sft", **{**sft, **further}, out_dir=out / "more")
    step("sft", **{**sft, **further}, data=chosen, val_data="toy", out_dir=out / "chosen")

    # the source's failure, on purpose: the reference is the model before SFT. dpo.py refuses it unless told otherwise.
    untrained = {"init_from": "scratch", "tokenizer": "toy", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 128}
    step("precompute_ref", **untrained, **data, seed=cfg.seed, out=refs["wrong"])
    wrong = {"init_from": model, "ref": refs["wrong"], "allow_ref_mismatch": "true", "samples": 0}
    step("dpo", **dpo, max_steps=cfg.dpo_steps, **wrong, out_dir=out / "wrong")

    results = {"chance": 0.25, "seed": cfg.seed, **{name: evaluate(out / name, cfg.problems) for name in LABELS}}
    results["seconds"] = round(time.monotonic() - begin, 1)
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    try:
        draw(results, {name: read_run(out / name) for name in ("dpo", "wrong")}, out / "demo.png")
    except UserError as error:  # without matplotlib there is no picture
        warn(str(error))
    print("\n" + table(results))
    print(f"\n{results['seconds']:.0f} s; {out}/results.json, {out}/demo.png")


def table(results: dict) -> str:
    lines = [f"{'':24}{'accuracy':>16}{'written':>16}{'aligned':>10}", f"{'chance':24}{results['chance']:>8.3f}"]
    for name, label in LABELS.items():
        r = results[name]
        scores = "".join(f"{r[k]:>8.3f} ± {r[k + '_stderr']:.3f}" for k in ("acc", "written_acc"))
        lines.append(f"{label:24}{scores}{r['aligned']:>10.3f}")
    about = "accuracy: the likeliest option; written: the text it writes; {n:,} held-out problems, ± one standard error"
    return "\n".join([*lines, about.format(n=results["sft"]["n"])])


def draw(results: dict, runs: dict, path: Path) -> None:
    """The table as bars, and DPO's log-probs on validation pairs with the right and with the wrong reference."""
    fig = figure(path, 15, 5.5)
    bars, lines = fig.subplots(1, 2, width_ratios=(3, 2))
    for shift, field, label in ((-0.2, "acc", "likeliest option"), (0.2, "written_acc", "written")):
        places, heights = [i + shift for i in range(len(LABELS))], [results[n][field] for n in LABELS]
        errors = [results[n][field + "_stderr"] for n in LABELS]
        drawn = bars.bar(places, heights, 0.4, yerr=errors, capsize=3, label=label)
        bars.bar_label(drawn, fmt="%.2f", padding=2)
    bars.axhline(results["chance"], color="grey", linestyle=":", label="chance")
    bars.set_xticks(range(len(LABELS)), [label.replace(", ", ",\n").replace(" on ", "\non ") for label in LABELS.values()])
    bars.set(ylim=(0, 1.09), ylabel="accuracy", title=f"{results['sft']['n']:,} held-out problems, ± one standard error")
    bars.legend(loc="upper left")
    for name, colour in (("dpo", "#009E73"), ("wrong", "#D55E00")):
        for field, style in (("logps/chosen", "-"), ("logps/rejected", "--")):
            label = f"{LABELS[name]}: {field.split('/')[1]}"
            lines.plot(*series(runs[name], "val", field), style, marker="o", color=colour, label=label)
    lines.set(xlabel="step", ylabel="log-probability of a completion (nats)", title="validation pairs during DPO")
    lines.legend(fontsize=9)
    save(fig, path)


if __name__ == "__main__":
    run(main)

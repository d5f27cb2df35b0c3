"""How good is what a model wrote? Asked of a judge, or without one of the model's own log-probs.

    python eval_winrate.py --responses runs/hh_dpo.jsonl --mode pairwise --against chosen \\
        --judge openai --judge_model gpt-4o-mini --out runs/hh_dpo_winrate.json --limit 250 --trials 3
    python eval_winrate.py --responses runs/alpaca.jsonl --mode score --against output \\
        --judge http://127.0.0.1:8000/v1 --judge_model llama3 --out runs/alpaca_score.json
    python eval_winrate.py --mode reward --model runs/hh_dpo/model --ref_model runs/hh_sft/model --data hh --out reward.json

pairwise: which of two texts is better, the model's or the other one? score: 0 to 100 against a reference answer. reward: does
the implicit reward beta * (log pi - log ref) of the DPO paper (Rafailov et al. 2023, section 4) put chosen over rejected on
held-out pairs? docs/judging.md says what the figures mean; `python plot.py RESULT.json …` draws them against model size.
"""

import json
import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import adapters
import weights
from base.errors import UserError, run, warn
from base.files import check_file, write_whole
from data import jsonl
from data.encode import Encoded, data_hash, load_encoded
from data.hh import TURN
from data.tokenizer import choose
from dpo import as_pairs, lengths_of
from judge.client import Cache, Decision, Judge, Question, address
from judge.verdict import fill, read_template, score, side
from model import SIZES, GPTConfig
from precompute_ref import reference_logps
from runtime import config, distributed, reference
from runtime.config import REQUIRED, key
from runtime.keys import ModelKeys
from runtime.run import build_model, context

PLACEHOLDERS = {"pairwise": ("prompt", "response_a", "response_b"), "score": ("prompt", "reference", "response")}
REFERENCES = ("chosen", "completion", "output")  # fields that hold an answer to compare with, the first that is there
Z = 1.959964  # of a two-sided 95% interval


@dataclass
class Config:
    """Win rate or score by a judge, or preference accuracy of the implicit reward."""

    mode: str = key("pairwise", "compare two texts, grade one, or ask no judge", ["pairwise", "score", "reward"])
    out: str = key(REQUIRED, "JSON file for the result")
    details: str = key("", "JSONL file for a line a judgement (or pair)")
    label: str = key("", "name of the run in tables and pictures (SFT, DPO, …)")
    model: str = key("", "the model that wrote the responses, a folder or gpt2 …: its size is noted (reward: required)")
    parameters: int = key(0, "its number of parameters, where `model` cannot tell")
    limit: int = key(0, "use only the first so many prompts or pairs, 0 = all")
    seed: int = key(0, "seed of who is side A, and of which examples the table shows")
    # pairwise and score
    responses: str = key("", "JSONL file of sample.py: {'prompt', 'completions', …}")
    against: str = key("", "field of those lines, or a JSONL file; empty = the field chosen, completion or output")
    judge: str = key("", "address of an OpenAI-compatible or Gemini server; openai, gemini = the companies' own")
    judge_model: str = key("", "name of the judge at that server")
    judge_prompt: str = key("", "text file of the judge's prompt, empty = prompts/judge_MODE.txt")
    api: str = key("auto", "the server's protocol, auto = told by its address", ["auto", "openai", "gemini"])
    api_key_env: str = key("", "environment variable with the API key, empty = OPENAI_API_KEY or GEMINI_API_KEY")
    trials: int = key(1, "times that every prompt is judged; trial t takes the t-th completion, or the only one")
    both_orders: bool = key(False, "pairwise: ask with both as side A; a disagreement is a tie")
    cache: str = key("", "JSONL file of the judge's answers, empty = beside `out`, as NAME.cache.jsonl")
    table: str = key("", "Markdown file for a table of examples")
    table_rows: int = key(10, "examples in the table")
    temperature: float = key(0.0, "of the judge; negative = leave it to the server")
    max_tokens: int = key(1024, "most tokens of a judge's reply; 0 = leave it to the server")
    asks: int = key(3, "times that a question is asked until its reply has a clear verdict")
    tries: int = key(6, "times that a request is sent until it is answered")
    timeout: float = key(60.0, "seconds to wait for an answer")
    workers: int = key(8, "requests at a time")
    max_calls: int = key(0, "most answers to pay for, 0 = no limit")
    price_in: float = key(0.0, "price of a million tokens sent, for the estimate")
    price_out: float = key(0.0, "price of a million tokens received")
    dry_run: bool = key(False, "print what it would take and stop")
    # reward
    ref: str = key("", "reward: reference file of precompute_ref.py that has these pairs")
    ref_model: str = key("", "reward: the reference model, instead of ref")
    data: str = key("", "reward: a recipe or a .jsonl / .jsonl.gz file of pairs")
    data_dir: str = key("", "reward: folder that holds a recipe's files, instead of downloading them")
    split: str = key("val", "reward: the recipe's split", ["train", "val", "test"])
    tokenizer: str = key("auto", "reward: gpt2, toy, a folder, or auto = the model's own")
    max_len: int = key(0, "reward: most tokens of prompt + completion, 0 = the model's context")
    truncation: str = key("drop", "reward: what to do with longer ones: drop them, or cut the prompt's start", ["drop", "left"])
    beta: float = key(0.1, "reward: strength of the pull to the reference")
    micro_tokens: int = key(8192, "reward: most tokens in one forward, padding included")
    device: str = key("auto", "reward: auto, cpu, cuda, cuda:1, …")
    dtype: str = key("auto", "reward: dtype of matrix products: bfloat16 on CUDA that has it, else float32")

    def check(self) -> None:
        needs = {"reward": "model data"}.get(self.mode, "responses judge judge_model")
        for name in needs.split():
            if not getattr(self, name):
                raise UserError(f"missing key {name}: mode {self.mode} needs it")
        if self.mode == "reward" and bool(self.ref) == bool(self.ref_model):
            raise UserError("key ref: mode reward needs the reference: give either --ref FILE.safetensors or --ref_model DIR")
        for name in "trials asks tries workers table_rows micro_tokens".split():
            self.at_least(1, name)
        for name in "limit parameters max_tokens max_calls price_in price_out max_len seed".split():
            self.at_least(0, name)
        for name in ("timeout", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"key {name}: {getattr(self, name)} must be above 0")
        if not math.isfinite(self.temperature):
            raise UserError(f"key temperature: {self.temperature} must be a number")
        if self.both_orders and self.mode != "pairwise":
            raise UserError(f"key both_orders: there are no two orders in mode {self.mode}")
        if not self.out:
            raise UserError("key out: empty: name a file for the result")
        if not self.cache:
            self.cache = str(Path(self.out).with_suffix(".cache.jsonl"))
        for name in ("out", "details", "table", "cache"):
            check_file(name, getattr(self, name))
            for other in ("responses", "against", "out", "details", "table", "cache"):
                if name != other and getattr(self, name) and Path(getattr(self, name)) == Path(getattr(self, other)):
                    raise UserError(f"key {name}: {getattr(self, name)} is also the file of key {other}: name another one")
        if self.mode != "reward":
            address(self.judge, self.judge_model, self.api)

    def at_least(self, least: float, name: str) -> None:
        if not least <= getattr(self, name) < math.inf:
            raise UserError(f"key {name}: {getattr(self, name)} is out of range, the least is {least}")


# --- what is judged -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A prompt, the text to judge and the one to hold it against, a text a trial each. `source`: file:line."""

    prompt: str
    texts: tuple[str, ...]
    others: tuple[str, ...]
    source: str


def prompt_of(record: dict, where: str) -> str:
    """The prompt of a line: `prompt`, or an instruction in Alpaca's fields."""
    if "prompt" in record or "instruction" not in record:
        return jsonl.get(record, "prompt", str, where)
    extra = jsonl.get(record, "input", str, where) if "input" in record else ""
    return f"{jsonl.get(record, 'instruction', str, where)}\n\n{extra}".strip()


def completions_of(record: dict, where: str, trials: int) -> tuple[str, ...]:
    """A text a trial: the t-th completion, or the only one every time."""
    found = jsonl.get(record, "completions", list, where)
    if not found or not all(isinstance(text, str) for text in found):
        raise UserError(f"{where}: the field 'completions' must be a list of at least one text")
    if 1 < len(found) < trials:
        raise UserError(f"{where}: {len(found)} completions for {trials} trials: give one, or as many as trials")
    return tuple(text.strip() for text in (found * trials if len(found) == 1 else found)[:trials])


def reference_of(record: dict, field: str, prompt: str, where: str) -> str:
    """The text of a field (empty: the first of REFERENCES that is there). A dialogue in Anthropic HH's form begins with its
    prompt, which goes."""
    field = field or next((name for name in REFERENCES if name in record), REFERENCES[0])
    text = jsonl.get(record, field, str, where)
    return (text.removeprefix(prompt) if prompt.endswith(TURN) else text).strip()


def read_items(responses: str, against: str, trials: int, limit: int) -> list[Item]:
    """The responses and what they are held against. UserError, naming file and line, for whatever does not fit."""
    ours = list(jsonl.read(responses))
    theirs = ours
    from_file = against.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz"))
    if from_file:
        theirs = list(jsonl.read(against))
        if len(ours) != len(theirs):
            raise UserError(
                f"{responses} has {len(ours):,} lines and {against} has {len(theirs):,}: line for line they must be answers to "
                "the same prompts"
            )
    items = []
    for (where, record), (there, other) in list(zip(ours, theirs, strict=True))[: limit or None]:
        prompt = prompt_of(record, where)
        if from_file and {"prompt", "instruction"} & set(other) and prompt_of(other, there) != prompt:
            raise UserError(f"{there}: another prompt than at {where}: line for line they must be answers to the same prompts")
        if from_file and "completions" in other:
            others = completions_of(other, there, trials)
        else:
            others = (reference_of(other, "" if from_file else against, prompt, there),) * trials
        items.append(Item(prompt, completions_of(record, where, trials), others, where))
    return items


# --- judging --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What came of one item in one trial. `outcome`: "win", "loss" or "tie" for the response, or its score; None = failed."""

    number: int
    trial: int
    outcome: str | float | None
    sides: str  # where the response stood in each question: "A", "B", "AB"
    decisions: tuple[Decision, ...]


def first_side(seed: int, trial: int, number: int) -> str:
    """Where the response stands, drawn at random for every prompt and trial."""
    return random.Random(f"{seed} {trial} {number}").choice("AB")


def judge_pairwise(judge: Judge, items: list[Item], template: str, cfg: Config) -> list[Judgement]:
    asked, sides = [], {}
    for trial in range(cfg.trials):
        for number, item in enumerate(items):
            sides[trial, number] = "AB" if cfg.both_orders else first_side(cfg.seed, trial, number)
            for where in sides[trial, number]:
                pair = (item.texts[trial], item.others[trial])
                a, b = pair if where == "A" else pair[::-1]
                asked.append(Question(fill(template, prompt=item.prompt, response_a=a, response_b=b), f"trial {trial}"))
    decided = iter(judge.decide(asked, side, cfg.dry_run))
    if cfg.dry_run:
        return []
    judgements = []
    for (trial, number), stood in sides.items():
        decisions = tuple(next(decided) for _ in stood)
        seen = [outcome_of(d.verdict, where) for d, where in zip(decisions, stood, strict=True)]
        outcome = None if None in seen else seen[0] if len(set(seen)) == 1 else "tie"
        judgements.append(Judgement(number, trial, outcome, stood, decisions))
    return judgements


def outcome_of(verdict: str | None, where: str) -> str | None:
    """A verdict ("A", "B", "tie") from the view of the response that stood at side `where`."""
    return verdict if verdict in (None, "tie") else "win" if verdict == where else "loss"


def judge_score(judge: Judge, items: list[Item], template: str, cfg: Config) -> list[Judgement]:
    place = [(trial, number) for trial in range(cfg.trials) for number in range(len(items))]
    asked = [
        Question(fill(template, prompt=items[n].prompt, reference=items[n].others[t], response=items[n].texts[t]), f"trial {t}")
        for t, n in place
    ]
    decided = judge.decide(asked, score, cfg.dry_run)
    return [Judgement(n, t, d.verdict, "", (d,)) for (t, n), d in zip(place, decided, strict=not cfg.dry_run)]


# --- figures --------------------------------------------------------------------------------------------------------


def wilson(p: float, n: int) -> list[float]:
    """95% interval of a share p seen in n trials: the score interval of E. B. Wilson, 1927 (JASA 22, 209-212)."""
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + Z * Z / n)), min(1.0, (middle + half) / (1 + Z * Z / n))]


def spread(values: list[float]) -> dict:
    """Mean, standard deviation (n - 1), least and largest of some values; each null where there is none."""
    if not values:
        return dict.fromkeys(("mean", "std", "min", "max"))
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "min": min(values), "max": max(values)}


def share_won(outcomes: Iterable[str]) -> float:
    """Wins, and half the ties, over all."""
    return statistics.fmean({"win": 1.0, "tie": 0.5, "loss": 0.0}[outcome] for outcome in outcomes)


def by_trial(judgements: list[Judgement], trials: int) -> list[list]:
    """The outcomes of every trial that did not fail."""
    return [[j.outcome for j in judgements if j.trial == t and j.outcome is not None] for t in range(trials)]


def grade_pairwise(judgements: list[Judgement], items: list[Item], trials: int) -> dict:
    """Counts over all trials, the win rate, its interval, its spread over trials, and the lengths of winners and losers."""
    outcomes = [j.outcome for j in judgements]
    decided = [outcome for outcome in outcomes if outcome is not None]
    rates = [share_won(trial) for trial in by_trial(judgements, trials) if trial]
    lengths = []
    for j in judgements:
        ours, theirs = len(items[j.number].texts[j.trial]), len(items[j.number].others[j.trial])
        if j.outcome in ("win", "loss"):
            lengths.append((ours, theirs) if j.outcome == "win" else (theirs, ours))
    unlike = [winner > loser for winner, loser in lengths if winner != loser]
    prompts = len({j.number for j in judgements if j.outcome is not None})  # trials of a prompt are no further prompts
    rate = share_won(decided) if decided else None
    return {
        "n": len(judgements),
        **{name: outcomes.count(one) for name, one in {"wins": "win", "losses": "loss", "ties": "tie", "failed": None}.items()},
        "win_rate": rate,
        "ci95": wilson(rate, prompts) if decided else None,
        "trials": trials,
        "prompts": len(items),
        "over_trials": {**spread(rates), "values": rates},
        "characters": {
            "winners": statistics.fmean(w for w, _ in lengths) if lengths else None,
            "losers": statistics.fmean(l for _, l in lengths) if lengths else None,
            "longer_won": statistics.fmean(unlike) if unlike else None,
        },
    }


def grade_score(judgements: list[Judgement], items: list[Item], trials: int) -> dict:
    """Mean score, standard deviation over prompts, and the mean's interval: mean +- 1.96 std / sqrt(prompts)."""
    scores: dict[int, list[float]] = {}
    for j in judgements:
        if j.outcome is not None:
            scores.setdefault(j.number, []).append(j.outcome)
    found = spread([statistics.fmean(values) for values in scores.values()])
    half = Z * found["std"] / math.sqrt(len(scores)) if scores else 0.0
    means = [statistics.fmean(trial) for trial in by_trial(judgements, trials) if trial]
    return {
        "n": len(judgements),
        "mean": found["mean"],
        "std": found["std"],
        "ci95": [max(0.0, found["mean"] - half), min(100.0, found["mean"] + half)] if scores else None,
        "failed": sum(j.outcome is None for j in judgements),
        "trials": trials,
        "prompts": len(items),
        "over_trials": {**spread(means), "values": means},
    }


def say(result: dict) -> str:
    """The result in words."""
    if "win_rate" in result and result["win_rate"] is not None:
        low, high = result["ci95"]
        text = (
            f"win rate {100 * result['win_rate']:.1f}% (95% interval {100 * low:.1f} to {100 * high:.1f}, Wilson): "
            + ", ".join(f"{result[name]} {name}" for name in ("wins", "losses", "ties", "failed"))
            + f" of {result['n']}"
        )
        scale, unit = 100, "%"
        sizes = result["characters"]
        if sizes["longer_won"] is not None:
            text += (
                f"\nthe better text has {sizes['winners']:.0f} characters, the other {sizes['losers']:.0f}; the longer one won "
                f"{100 * sizes['longer_won']:.0f}% of the time"
            )
    elif result.get("mean") is not None:
        low, high = result["ci95"]
        text = f"score {result['mean']:.2f} (95% interval {low:.2f} to {high:.2f}), {result['failed']} failed of {result['n']}"
        scale, unit = 1, ""
    else:
        return f"no verdict at all: {result['failed']} failed of {result['n']}"
    if result["trials"] > 1:
        over = {name: value * scale for name, value in result["over_trials"].items() if name != "values"}
        text += f"\n{result['trials']} trials: " + ", ".join(f"{name} {value:.2f}{unit}" for name, value in over.items())
    return text


# --- files ----------------------------------------------------------------------------------------------------------

MARKUP = {ord(c): f"&#{ord(c)};" for c in r"<>&|[]*_`\#~$"}  # what Markdown or HTML would make something of


def cell(text: str, most: int = 400, end: bool = False) -> str:
    """A text as one cell of a Markdown table, cut to its start (or `end`)."""
    if len(text) > most:
        text = "… " + text[-most:].lstrip() if end else text[:most].rstrip() + " …"
    return "<br>".join(line.translate(MARKUP) for line in text.strip().splitlines())


def examples_table(judgements: list[Judgement], items: list[Item], rows: int, seed: int) -> str:
    """Prompt, response, what it was held against, and what came of it, for prompts drawn at random from the first trial."""
    first = [j for j in judgements if j.trial == 0]
    drawn = random.Random(seed).sample(first, min(rows, len(first)))
    lines = ["| | prompt | response | held against | outcome |", "|---|---|---|---|---|"]
    for j in sorted(drawn, key=lambda j: j.number):
        item = items[j.number]
        outcome = "failed" if j.outcome is None else j.outcome if isinstance(j.outcome, str) else f"{j.outcome:g}"
        cells = [cell(item.prompt, end=True), cell(item.texts[0]), cell(item.others[0]), outcome]
        lines.append(f"| {j.number} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def detail(j: Judgement, items: list[Item]) -> dict:
    """A judgement as a line of `details`."""
    item = items[j.number]
    return {
        "id": j.number,
        "trial": j.trial,
        "source": item.source,
        "outcome": j.outcome,
        **({"side": list(j.sides)} if j.sides else {}),
        "verdicts": [d.verdict for d in j.decisions],
        "replies": [[r.text for r in d.replies] for d in j.decisions],
        "failed": [d.failed for d in j.decisions if d.failed],
        "characters": [len(item.texts[j.trial]), len(item.others[j.trial])],
    }


def by_judge(cfg: Config) -> dict | None:
    """Modes pairwise and score, from the files to the files; the result, None after a dry run."""
    template_path = cfg.judge_prompt or Path(__file__).parent / "prompts" / f"judge_{cfg.mode}.txt"
    template = read_template(template_path, PLACEHOLDERS[cfg.mode])
    items = read_items(cfg.responses, cfg.against, cfg.trials, cfg.limit)
    size = cfg.parameters or (parameters_of(cfg.model) if cfg.model else 0)
    cache = Cache(cfg.cache)
    try:
        judge = Judge(cfg, cache)
        judgements = (judge_pairwise if cfg.mode == "pairwise" else judge_score)(judge, items, template, cfg)
    finally:
        cache.close()
    if cfg.dry_run:
        return None
    grade = grade_pairwise if cfg.mode == "pairwise" else grade_score
    settings = ("mode", "label", "model", "responses", "against", "judge_model", "seed", "both_orders", "temperature")
    result = {
        **grade(judgements, items, cfg.trials),
        "usage": judge.usage(d for j in judgements for d in j.decisions),
        "parameters": size or None,
        "judge": judge.shown,
        "judge_prompt": template,
        **{name: getattr(cfg, name) for name in settings},
    }
    if cfg.details:
        write_whole(cfg.details, "".join(json.dumps(detail(j, items)) + "\n" for j in judgements))
    if cfg.table:
        write_whole(cfg.table, examples_table(judgements, items, cfg.table_rows, cfg.seed).encode(errors="replace"))
    write_whole(cfg.out, json.dumps(result, indent=1) + "\n")

    unanswered = sum(any(d.failed.startswith("no answer") for d in j.decisions) for j in judgements)
    if result["failed"]:
        again = f", {unanswered} of them without an answer: the same command asks those again" if unanswered else ""
        warn(f"{result['failed']} of {result['n']} judgements failed and count for neither side{again}; --details says why")
    used = ", ".join(
        f"{name} {value:,.4f}" if name == "cost" else f"{name} {value:,}" for name, value in result["usage"].items()
    )
    print(f"{say(result)}\nthe judge took in all: {used}; asked now: {judge.calls:,} calls")
    return result


def parameters_of(model: str) -> int:
    """Parameters of a model or adapter folder or of a known name, the head not counted apart; no weights are read."""
    known = dict(zip((f"openai:{size}" for size in weights.OPENAI), SIZES.values(), strict=True)) | SIZES
    shape = GPTConfig(*known[model]) if model in known else replace(adapters.source(model)[0], tied=True)
    return sum(p.numel() for p in weights.empty(shape).parameters())


# --- without a judge ------------------------------------------------------------------------------------------------


def stored_reference(path: str, items: list[Encoded]) -> Tensor:
    """The log-probs of these very pairs from a file of precompute_ref.py, whether as its training or validation pairs."""
    tensors, metadata = reference.read(path)
    here = data_hash(items)
    for name in ("", "val_"):
        if metadata.get(f"{name}data_sha256") == here:
            return tensors[f"{name}logps"]
    made = ", ".join(f"{name} {metadata.get(name)}" for name in ("data", "tokenizer", "max_len", "truncation"))
    raise UserError(
        f"key ref: {path} does not hold these pairs (it was made from {made}): evaluate with the same, and its number of pairs "
        "as limit; or give --ref_model"
    )


def grade_reward(policy: Tensor, ref: Tensor, items: list[Encoded], beta: float) -> tuple[dict, list[dict]]:
    """(result, a detail a pair) from log pi(y|x) under policy and reference, (pairs, 2) each, in nats.

    Standard errors count the pairs of one group (one problem's) as one draw, so three pairs of a problem are not three
    independent ones; for groups of one they are the usual ones, sqrt(p (1 - p) / (n - 1)) for the accuracy.
    """
    p = as_pairs(policy.double(), ref.double(), lengths_of(items, policy.device))
    margins = beta * p.h
    _, group = torch.unique(torch.tensor([item.group for item in items]), return_inverse=True)
    groups = int(group.max()) + 1

    def mean(name: str, values: Tensor) -> dict:
        sums = torch.zeros(groups, dtype=torch.float64).index_add(0, group, values - values.mean())
        error = sums.square().sum().sqrt() / len(values) * math.sqrt(groups / max(groups - 1, 1))
        return {name: values.mean().item(), f"{name}_stderr": error.item()}

    result = {
        "n": len(items),
        **mean("accuracy", (margins > 0).double()),
        **mean("margin", margins),
        **mean("gain_chosen", p.ratio_chosen),
        **mean("gain_rejected", p.ratio_rejected),
        "equal": int((margins == 0).sum()),
    }
    numbers = zip(items, policy.tolist(), ref.tolist(), margins.tolist(), strict=True)
    return result, [{"id": i.number, "logps": a, "ref_logps": b, "margin": m} for i, a, b, m in numbers]


def by_reward(cfg: Config, compute) -> dict:
    """Mode reward, from the models to the files."""
    print(compute)
    tokenizer = choose(cfg.tokenizer, cfg.model)
    model = build_model(ModelKeys(init_from=cfg.model), tokenizer, compute)
    max_len = context(cfg.max_len, model)
    policy = {"data_dir": cfg.data_dir, "limit": cfg.limit}
    items = compute.once(lambda: load_encoded(cfg.data, cfg.split, "preference", tokenizer, max_len, cfg.truncation, **policy))
    ref = compute.once(lambda: stored_reference(cfg.ref, items)) if cfg.ref else None
    sums = reference_logps(model, items, compute, cfg.micro_tokens)
    size = sum(p.numel() for p in model.parameters())
    if ref is None:
        del model
        model = build_model(ModelKeys(init_from=cfg.ref_model), tokenizer, compute)
        context(max_len, model)
        ref = reference_logps(model, items, compute, cfg.micro_tokens)
    result, details = grade_reward(sums, ref, items, cfg.beta)
    if result["equal"] == len(items):
        warn("policy and reference agree on every pair: they are the same model")
    result |= {name: getattr(cfg, name) for name in ("mode", "label", "model", "ref", "ref_model", "data", "split", "beta")}
    result["parameters"] = cfg.parameters or size
    if cfg.details:
        compute.once(lambda: write_whole(cfg.details, "".join(json.dumps(d) + "\n" for d in details)))
    compute.once(lambda: write_whole(cfg.out, json.dumps(result, indent=1) + "\n"))
    print(
        f"chosen over rejected in {100 * result['accuracy']:.1f}% (standard error {100 * result['accuracy_stderr']:.1f}) of "
        f"{result['n']:,} pairs; margin {result['margin']:.4f} (beta {cfg.beta}); log-prob gain over the reference "
        f"{result['gain_chosen']:+.3f} chosen, {result['gain_rejected']:+.3f} rejected, in nats"
    )
    return result


def main() -> None:
    cfg = config.load(Config, prog="eval_winrate.py")
    if cfg.mode == "reward":
        compute = distributed.setup(cfg.device, cfg.dtype)
        result = by_reward(cfg, compute)
    else:
        compute = distributed.setup("cpu")  # of several processes one asks
        result = compute.once(lambda: by_judge(cfg))
    if result:
        shown = {name: value for name, value in result.items() if isinstance(value, int | float | list)}
        print(json.dumps(shown))


if __name__ == "__main__":
    run(main)
